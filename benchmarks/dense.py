"""Training with and without dense layers that flatten tokens (`models/dense.py`).

    python -m benchmarks.dense [--batch 128] [--repeats 7] [--json]

The small ViT of configs/cifar10_cpu.py: a derivative of one kernel, width to four times the width;
one MLP, one attention and the whole model, forward and backward. `flat` and `axes`, which is
`lax.dot_general` with images and tokens in axes of their own, take turns in one process; `ratio` is
flat over axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common
from vit_interact.models.attention import MultiHeadDotProductAttention
from vit_interact.models.config import ViTConfig
from vit_interact.models.dense import flat_dot_general
from vit_interact.models.vit import MlpBlock, ViT

CONFIG = ViTConfig(
    image_size=(32, 32), patch_size=(4, 4), width=128, depth=6, heads=4, mlp_dim=512, num_classes=10
)


def cases(batch: int) -> dict[str, tuple[Callable[[Any], Callable[..., Any]], tuple[Any, ...]]]:
    """By name, what makes the function of a product, and its arguments."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(
        rng.normal(size=(batch, CONFIG.layout.num_tokens, CONFIG.width)), "float32"
    )
    pixels = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), "float32")
    kernel = jnp.asarray(rng.normal(size=(CONFIG.width, CONFIG.mlp_dim)), "float32")

    def of_kernel(product: Any) -> Callable[..., Any]:
        numbers = (((2,), (0,)), ((), ()))
        return jax.grad(lambda kernel, x: jnp.sum(jnp.square(product(x, kernel, numbers))))

    def of_module(module: Any, count: int) -> Callable[[Any], Callable[..., Any]]:
        def make(product: Any) -> Callable[..., Any]:
            del product  # patched where the modules look it up
            return jax.grad(
                lambda params, x: jnp.sum(jnp.square(module.apply(params, *[x] * count))), (0, 1)
            )

        return make

    found: dict[str, Any] = {"derivative of a kernel": (of_kernel, (kernel, tokens))}
    attention = MultiHeadDotProductAttention(CONFIG.heads)
    for name, module, count, x in (
        ("MLP", MlpBlock(CONFIG), 1, tokens),
        ("attention", attention, 2, tokens),
        ("model", ViT(CONFIG), 1, pixels),
    ):
        params = module.init(jax.random.key(0), *[x[:1]] * count)
        found[f"{name}, forward + backward"] = of_module(module, count), (params, x)
    return found


def measure(make: Any, arguments: tuple[Any, ...], repeats: int) -> common.Row:
    """One row: both products."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, product in (("flat", flat_dot_general), ("axes", lax.dot_general)):
        with (
            mock.patch("vit_interact.models.vit.flat_dot_general", product),
            mock.patch("vit_interact.models.attention.flat_dot_general", product),
        ):
            compiled = jax.jit(make(product)).lower(*arguments).compile()
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*arguments))
    times = common.take_turns(calls, repeats)
    return {
        **{f"{name}_ms": 1e3 * times[name].seconds for name in calls},
        **{f"cpu_{name}_ms": 1e3 * times[name].cpu_seconds for name in calls},
        "ratio": times["flat"].ratio(times["axes"]),
        "cpu_ratio": times["flat"].cpu_ratio(times["axes"]),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=7)
    parser.add_argument("--batch", type=int, default=128, help="images")
    options = parser.parse_args()
    report = common.Report("dense", {"batch": options.batch, "dtype": "float32"})
    for name, (make, arguments) in cases(options.batch).items():
        report.add(what=name, **measure(make, arguments, options.repeats))
    report.show(options.json)


if __name__ == "__main__":
    main()
