"""Time and memory of indicators at high resolution, up to 1,024 pixels and 4,096 patches.

    python -m benchmarks.high_resolution [--model vit_s16] [--sizes 224,512,1024] [--json]
    python -m benchmarks.high_resolution --compile-only            # memory alone: seconds
    python -m benchmarks.high_resolution --measure NAME=VALUE      # another way of vi.measure

`temporary_mib` is what the compiled program allocates beside weights, images and maps; `output_mib`
the maps. `ratio` is to the forward pass of the same size, the median of runs that take turns;
`gflop_s` counts the forward pass's matrix products alone. `--measure` hands its arguments to
`vi.measure`, so that other implementations are measured by the same command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.train.speed import forward_flops


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=3)
    parser.add_argument("--model", default="vit_s16", choices=vi.list_models())
    parser.add_argument("--sizes", type=common.numbers, default=common.numbers("224,512,1024"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--indicators", type=common.some_of(tuple(vx.INDICATORS)),
                        default=["attention", "leave_one_out", "edge"])  # fmt: skip
    parser.add_argument("--compile-only", action="store_true", help="memory, without running")
    common.add_measure(parser)
    options = parser.parse_args()
    fixed = {"model": options.model, "batch": options.batch, "dtype": options.dtype,
             "layers": "all", "measure": options.measure or "defaults"}  # fmt: skip
    report = common.Report("high_resolution", fixed)
    for size in options.sizes:
        repeats = 0 if options.compile_only else options.repeats
        for row in measure(options, size, repeats):
            report.add(**row)
    report.show(options.json)


def measure(options: Any, size: int, repeats: int) -> list[common.Row]:
    """Rows of one image size; without times where `repeats` is 0."""
    model = vi.create_model(options.model, image_size=size, dtype=options.dtype)
    shape = (options.batch, size, size, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    params = common.random_params(model)
    arguments = dict(options.measure)
    functions: dict[str, Callable[..., Any]] = {
        "forward": lambda params, images: model.apply({"params": params}, images)
    }
    for name in options.indicators:
        functions[name] = lambda params, images, name=name: vi.measure(
            model, params, images, (name,), **arguments
        )[name]
    compiled = {
        name: jax.jit(function).lower(params, images).compile()
        for name, function in functions.items()
    }
    times = {}
    if repeats:
        calls = {name: lambda run=run: run(params, images) for name, run in compiled.items()}
        times = common.take_turns(calls, repeats)
    rows = []
    for name, program in compiled.items():
        row: common.Row = {
            "pixels": size,
            "patches": model.config.layout.num_patches,
            "what": name,
            "temporary_mib": common.temporary_mib(program),
            "output_mib": program.memory_analysis().output_size_in_bytes / 2**20,
        }
        row["memory_ratio"] = row["temporary_mib"] / (rows or [row])[0]["temporary_mib"]
        if times:
            own = times[name]
            row |= {
                "s_image": own.seconds / options.batch,
                "cpu_s_image": own.cpu_seconds / options.batch,
                "ratio": own.ratio(times["forward"]),
                "cpu_ratio": own.cpu_ratio(times["forward"]),
            }
        if times and name == "forward":
            row["gflop_s"] = forward_flops(model.config) / row["s_image"] / 1e9
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
