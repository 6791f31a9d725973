"""Temporary memory of measuring against that of the forward pass, from the compiled programs.

`python -m benchmarks.memory [--model vit_s16] [--batch 8] [--json]`. Nothing is run: the compiler
says what it would allocate. Outputs (the maps themselves) are not temporaries and are listed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import jax

import vit_interact as vi
from vit_interact import interactions as vx


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_s16", choices=vi.list_models())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = vi.create_model(options.model)
    images = jax.ShapeDtypeStruct((options.batch, *model.config.image_size, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def compiled(function: Callable[..., Any]) -> dict[str, float]:
        memory = jax.jit(function).lower(params, images).compile().memory_analysis()
        return {
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "output_mib": memory.output_size_in_bytes / 2**20,
        }

    def backward(params: Any, images: Any) -> Any:
        return jax.grad(lambda x: model.apply({"params": params}, x).max(-1).sum())(images)

    forward = compiled(lambda p, x: model.apply({"params": p}, x))
    both = compiled(backward)
    rows = {"forward": forward, "forward + backward": both}
    for name in vx.INDICATORS:
        rows[name] = compiled(lambda p, x, name=name: vi.measure(model, p, x, (name,)))
    for name, row in rows.items():
        needs_backward = "output_grad" in vx.NEEDS.get(name, ())
        base = both if needs_backward else forward
        row["ratio"] = row["temporary_mib"] / base["temporary_mib"]
    report = {
        "model": options.model,
        "batch": options.batch,
        "dtype": model.config.dtype,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print({key: value for key, value in report.items() if key != "rows"})
    print(f"{'':20}{'temporary MiB':>14}{'outputs MiB':>13}{'ratio':>7}  to")
    for name, row in rows.items():
        base_name = "forward + backward" if "output_grad" in vx.NEEDS.get(name, ()) else "forward"
        print(
            f"{name:20}{row['temporary_mib']:14.1f}{row['output_mib']:13.1f}{row['ratio']:7.2f}"
            f"  {base_name}"
        )


if __name__ == "__main__":
    main()
