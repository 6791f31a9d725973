"""Temporary memory of measuring against that of the forward pass, from the compiled programs.

`python -m benchmarks.memory [--model vit_s16] [--batch 8] [--json]`. Nothing is run: the compiler
says what it would allocate. Outputs (the maps themselves) are not temporaries and are listed apart.
The last rows are of the gradient of a loss by the parameters: with explicit attention, and with
windows that each patch, or each patch and head, predicts.
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
    options = parser.parse_args()

    model = vi.create_model(options.model)
    images = jax.ShapeDtypeStruct((options.batch, *model.config.image_size, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    fixed = {"model": options.model, "batch": options.batch, "dtype": model.config.dtype}
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
    for name in vx.INDICATORS:
        row = compiled(lambda p, x, name=name: vi.measure(model, p, x, (name,)))
        base = "forward + backward" if "output_grad" in vx.NEEDS[name] else "forward"
        ratio = row["temporary_mib"] / bases[base]["temporary_mib"]
        report.add(what=name, **row, ratio=ratio, to=base)
    for name, row in _training(model, images).items():
        report.add(what=name, **row, to=_EXPLICIT)
    report.show(options.json)


if __name__ == "__main__":
    main()
