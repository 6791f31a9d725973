"""One block for all layers, looped by `nn.scan`, beside layers one by one: to make and to run.

    python -m benchmarks.one_block [--model vit_s14] [--pixels 224] [--repeats 3] [--json]

The program is that of `vi.analyze` for one image, as a command with few images makes it
(`Checkpoint.for_few`). `trace_s` and `compile_s` are what it takes without a kept program, `read_s`
what it takes to read a kept one, `first_s` its first run in a process, and `s` a later one.
`all_ratio` is tracing, compiling and the first run together over that of layers one by one,
`kept_ratio` reading and the first run. The two take turns in one process; medians over turns.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.models import cpu
from vit_interact.models.vit import ViT
from vit_interact.models.weights import stack_layers
from vit_interact.observe.analyze import _analyze

ONE_BY_ONE, ONE_BLOCK = "layers one by one", "one block"
STEPS = ("trace_s", "compile_s", "read_s", "first_s")
TOTALS = {"all_ratio": ("trace_s", "compile_s", "first_s"), "kept_ratio": ("read_s", "first_s")}


def make(model: ViT, params: Any, image: jax.Array, indicators: tuple[str, ...]) -> dict[str, Any]:
    """Makes the program once; what each step took, in seconds, and the program."""
    config = model.config
    told = (indicators, tuple(range(config.depth)), None, config.layout)

    # A function of its own: jit would not trace one twice.
    def analyze(params: Any, image: jax.Array) -> Any:
        return _analyze._function(model, params, image, None, *told)

    jax.clear_caches()
    options = cpu.compiler_options(model, len(image), seldom=True)
    program = jax.jit(analyze, compiler_options=options)
    lowered, trace_s = timed(lambda: program.lower(params, image))
    compiled, compile_s = timed(lowered.compile)
    kept = serialize_executable.serialize(compiled)
    # For one device: tests simulate several.
    load = functools.partial(serialize_executable.deserialize_and_load, *kept)
    read, read_s = timed(lambda: load(execution_devices=jax.devices()[:1]))
    _, first_s = timed(lambda: jax.block_until_ready(read(params, image)))
    return {"call": functools.partial(read, params, image), "trace_s": trace_s,
            "compile_s": compile_s, "read_s": read_s, "first_s": first_s}  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds that it took."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def rows(
    model: ViT, indicators: tuple[str, ...], repeats: int, later: int
) -> dict[str, common.Row]:
    """A row for each way, by its name."""
    params = common.random_params(model)
    image = jnp.zeros((1, *model.config.image_size, 3))
    ways = {
        ONE_BY_ONE: (model, params),
        ONE_BLOCK: (ViT(dataclasses.replace(model.config, scan=True)), stack_layers(params)),
    }
    turns = [{way: make(*made, image, indicators) for way, made in ways.items()}
             for _ in range(repeats)]  # fmt: skip
    times = common.take_turns({way: turns[-1][way]["call"] for way in ways}, later)
    found: dict[str, common.Row] = {}
    for way in ways:
        row = {step: float(np.median([turn[way][step] for turn in turns])) for step in STEPS}
        row |= {"s": times[way].seconds, "ratio": times[way].ratio(times[ONE_BY_ONE])}
        for name, steps in TOTALS.items():
            ratios = [_sum(turn[way], steps) / _sum(turn[ONE_BY_ONE], steps) for turn in turns]
            row[name] = float(np.median(ratios))
        found[way] = row
    return found


def _sum(made: dict[str, Any], steps: tuple[str, ...]) -> float:
    return sum(made[step] for step in steps)


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=3)
    parser.add_argument("--model", default="vit_s14", choices=vi.list_models())
    parser.add_argument("--pixels", type=int, default=224, help="of the image")
    parser.add_argument("--later", type=int, default=15, help="later runs that are timed")
    options = parser.parse_args()
    model = vi.create_model(options.model, image_size=options.pixels)
    report = common.Report("one_block", {"model": options.model, "pixels": options.pixels})
    sets = {
        "leave_one_out": ("leave_one_out",),
        "edge": ("edge",),
        "all seven": tuple(vx.INDICATORS),
    }
    for what, indicators in sets.items():
        found = rows(model, indicators, options.repeats, options.later)
        for way, row in found.items():
            report.add(what=what, way=way, **row)
    report.show(options.json)


if __name__ == "__main__":
    main()
