"""What each thing that is done for CPUs is worth: a pass with it and without.

    python -m benchmarks.cpu [--batch 128] [--repeats 7] [--json]

Passes of the small ViT of configs/cifar10_cpu.py (training, `--batch` images) and of ViT-S/16 at
224 pixels (forward, 8 images), float32, as they are and with one thing taken away, by turns in one
process; `ratio` is what then takes longer. Before its turn, memory is given back, and filled again
before the others'.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact.heap import keep_freed_memory
from vit_interact.models import dense, vit
from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import ViT

SMALL = ViTConfig(
    image_size=(32, 32), patch_size=(4, 4), width=128, depth=6, heads=4, mlp_dim=512, num_classes=10
)


def _without() -> dict[str, list[AbstractContextManager[Any]]]:
    """By name, what takes one thing away while a program is traced."""
    axes = mock.patch.object(dense, "on_cpu", lambda: False)
    wide = mock.patch.object(dense, "_MANY", float("inf"))
    erfc = mock.patch.dict(vit._ACTIVATIONS, gelu=lambda x: nn.gelu(x, approximate=False))
    fused = mock.patch.object(vit, "computed_once", lambda x: x)
    return {
        "as it is": [],
        "tokens and heads in axes of their own": [axes],
        "kernel's derivative wide matrix first": [wide],
        "GELU by erfc": [erfc],
        "residual stream's derivative in each layer again": [fused],
        "without these four": [axes, erfc, fused],
    }


def _pass(model: ViT, training: bool) -> Callable[..., Any]:
    """The forward pass, or a loss's gradient."""
    if not training:
        return lambda params, x: model.apply({"params": params}, x)
    return jax.grad(lambda params, x: jnp.sum(jnp.square(model.apply({"params": params}, x))))


def _returning(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with glibc's own settings, from a heap that has been given back."""
    libc = ctypes.CDLL(None)

    def run() -> Any:
        # M_MMAP_MAX and M_TRIM_THRESHOLD as glibc starts with.
        libc.mallopt(-4, 65536)
        libc.mallopt(-1, 128 * 1024)
        libc.malloc_trim(0)
        found = jax.block_until_ready(call())
        keep_freed_memory()
        return found

    return run


def measure(model: ViT, batch: int, training: bool, repeats: int) -> list[common.Row]:
    """The rows of one pass."""
    pixels = np.random.default_rng(0).normal(size=(batch, *model.config.image_size, 3))
    x = jnp.asarray(pixels, "float32")
    params = jax.jit(model.init)(jax.random.key(0), x[:1])["params"]
    calls: dict[str, Callable[[], Any]] = {}
    given_back, again = "memory given back after each pass", "memory filled again"
    calls[given_back] = calls[again] = lambda: None  # they come first
    for name, changes in _without().items():
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            # A function of its own: jit would not trace one twice.
            compiled = jax.jit(_pass(model, training)).lower(params, x).compile()
        calls[name] = lambda compiled=compiled: compiled(params, x)
    calls[given_back], calls[again] = _returning(calls["as it is"]), calls["as it is"]
    times = common.take_turns(calls, repeats)
    del times[again]
    base = times["as it is"]
    return [
        {
            "what": name,
            "ms": 1e3 * own.seconds,
            "cpu_ms": 1e3 * own.cpu_seconds,
            "ratio": own.ratio(base),
            "cpu_ratio": own.cpu_ratio(base),
        }
        for name, own in times.items()
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=7)
    parser.add_argument("--batch", type=int, default=128, help="images of the small ViT")
    options = parser.parse_args()
    report = common.Report("cpu", {"dtype": "float32"}, ("flax",))
    large = vi.create_model("vit_s16", num_classes=1000, image_size=224)
    for name, model, batch, training in (
        ("small ViT, training", ViT(SMALL), options.batch, True),
        ("ViT-S/16, forward", large, 8, False),
    ):
        for row in measure(model, batch, training, options.repeats):
            report.add(**{"pass": name, "batch": batch, **row})
    report.show(options.json)


if __name__ == "__main__":
    main()
