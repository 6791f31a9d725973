"""Temporary memory of measuring against that of the forward pass, from the compiled programs.

    python -m benchmarks.memory [--model vit_s16] [--batch 8] [--json]
    python -m benchmarks.memory --image-size 1024 --batch 1 --depth 2 --only leave_one_out edge

Nothing is run: the compiler says what it would allocate. Outputs (the maps themselves) are not
temporaries and are listed apart. At high resolution each indicator has three rows: blocks of
queries, which `vi.measure` then chooses; all queries at once; and blocks straight to fields.
`--only` limits the indicators, as each row takes a while to compile. The last rows, without it, are
of the gradient of a loss by the parameters: with explicit attention, and with windows that each
patch, or each patch and head, predicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.models.attend import suitable_blocks
from vit_interact.models.attention import Taps
from vit_interact.models.config import WindowConfig
from vit_interact.models.vit import ViT

_EXPLICIT = "training, explicit attention"


def _training(model: ViT, images: Any) -> dict[str, dict[str, float]]:
    """Memory of the gradient of a loss, with and without predicted windows."""
    one, each = WindowConfig(), WindowConfig(groups=model.config.heads)

    def windowed(windows: WindowConfig) -> ViT:
        return model.clone(config=dataclasses.replace(model.config, windows=windows))

    models = {
        _EXPLICIT: model.clone(taps=Taps()),
        "training, a window a patch": windowed(one),
        "training, a window a patch and head": windowed(each),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, trained in models.items():

        def loss(params: Any, images: Any, trained: ViT = trained) -> Any:
            logits: Any = trained.apply({"params": params}, images)
            return jnp.sum(jnp.square(logits.astype(jnp.float32)))

        params = jax.eval_shape(trained.init, jax.random.key(0), images)["params"]
        memory = jax.jit(jax.grad(loss)).lower(params, images).compile().memory_analysis()
        temporary = memory.temp_size_in_bytes / 2**20
        rows[name] = {
            "temporary_mib": temporary,
            "output_mib": memory.output_size_in_bytes / 2**20,
            "ratio": temporary / rows[_EXPLICIT]["temporary_mib"] if rows else 1.0,
        }
    return rows


def main() -> None:
    """Prints the table."""
    parser = common.make_parser(__doc__, repeats=0)
    parser.add_argument("--model", default="vit_s16", choices=vi.list_models())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, help="pixels; the model's own without it")
    parser.add_argument("--depth", type=int, help="layers; the model's own without it")
    parser.add_argument("--only", nargs="+", choices=tuple(vx.INDICATORS), help="indicators")
    options = parser.parse_args()

    changes: dict[str, Any] = {}
    if options.image_size is not None:
        changes["image_size"] = (options.image_size,) * 2
    if options.depth is not None:
        changes["depth"] = options.depth
    model = vi.create_model(options.model, **changes)
    images = jax.ShapeDtypeStruct((options.batch, *model.config.image_size, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    fixed = {
        "model": options.model, "batch": options.batch, "image_size": model.config.image_size,
        "depth": model.config.depth, "dtype": model.config.dtype,
    }  # fmt: skip
    report = common.Report("memory", fixed)

    def compiled(function: Callable[..., Any]) -> dict[str, float]:
        memory = jax.jit(function).lower(params, images).compile().memory_analysis()
        return {
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "output_mib": memory.output_size_in_bytes / 2**20,
        }

    def backward(params: Any, images: Any) -> Any:
        return jax.grad(lambda x: model.apply({"params": params}, x).max(-1).sum())(images)

    bases = {
        "forward": compiled(lambda p, x: model.apply({"params": p}, x)),
        "forward + backward": compiled(backward),
    }
    for name, row in bases.items():
        report.add(what=name, **row, ratio=1.0, to=name)
    tokens, heads = model.config.layout.num_tokens, model.config.heads
    ways: dict[str, dict[str, Any]] = {"": {}}
    if suitable_blocks(options.batch, heads, tokens, tokens) is not None:
        ways |= {", all queries at once": {"block": tokens}, ", fields": {"reduce": "fields"}}
    for name in options.only or vx.INDICATORS:
        base = "forward + backward" if "output_grad" in vx.NEEDS[name] else "forward"
        for way, choice in ways.items():
            row = compiled(
                lambda p, x, name=name, choice=choice: vi.measure(model, p, x, (name,), **choice)
            )
            ratio = row["temporary_mib"] / bases[base]["temporary_mib"]
            report.add(what=name + way, **row, ratio=ratio, to=base)
    if not (changes or options.only):
        for name, row in _training(model, images).items():
            report.add(what=name, **row, to=_EXPLICIT)
    report.show(options.json)


if __name__ == "__main__":
    main()
