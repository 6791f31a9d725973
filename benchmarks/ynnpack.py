"""What XLA's CPU compiler leaves to YNNPACK: sums over maps, and a program's first run.

    python -m benchmarks.ynnpack [--side 37] [--maps 13] [--pixels 224,518] [--json]

Sums are written as the package has them and as it had them; `ms` is with YNNPACK, as XLA decides by
itself, `own_ms` without, `ratio` the first over the second, in turns in one process. Maps are of
one image, so that an axis of one is in them.

A program's `first_ms` is its first run in a process, before which YNNPACK plans its operations, and
`ms` a later one; `own_first_ms` and `own_ms` are those of the program without YNNPACK.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.layout import TokenLayout
from vit_interact.models.cpu import without_ynnpack
from vit_interact.observe.analyze import _analyze

Function = Callable[[jax.Array], Any]


def sums(layout: TokenLayout, maps: int) -> dict[str, tuple[Function, jax.Array]]:
    """Functions with their arguments, by what they add up and how."""
    rng = np.random.default_rng(0)
    patches, tokens = layout.num_patches, layout.num_tokens
    rows = jnp.asarray(rng.random((maps, 1, patches, patches)), jnp.float32)
    whole = jnp.asarray(rng.random((maps, 1, tokens, tokens)), jnp.float32)
    row, col = (np.array(side, np.float32) for side in np.mgrid[: layout.rows, : layout.cols])

    def grid(rows: jax.Array) -> jax.Array:
        weights = rows / rows.sum(axis=-1, keepdims=True)
        return weights.reshape(*rows.shape[:-1], layout.rows, layout.cols)

    def logarithms(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = rows / rows.sum(axis=-1, keepdims=True)
        some = weights > 0
        return some, weights, jnp.log(jnp.where(some, weights, 1.0))

    def chosen(rows: jax.Array) -> jax.Array:
        some, weights, logs = logarithms(rows)
        return jnp.where(some, weights * logs, 0.0).sum(axis=-1)

    def plain(rows: jax.Array) -> jax.Array:
        _, weights, logs = logarithms(rows)
        return (weights * logs).sum(axis=-1)

    return {
        "covariance, one sum": (lambda x: (grid(x) * (row * col)).sum(axis=(-2, -1)), rows),
        "covariance, two sums": (
            lambda x: ((grid(x) * row[:, :1]).sum(axis=-2) * col[0]).sum(axis=-1),
            rows,
        ),
        "entropy, a choice around the product": (chosen, rows),
        "entropy, the product": (plain, rows),
        "layers, one by one": (lambda x: functools.reduce(jnp.add, x), whole),
        "layers, one sum": (lambda x: x.sum(axis=0), whole),
        "responsive_field": (lambda x: vx.responsive_field(x, layout), rows),
        "combine_layers": (lambda x: vx.combine_layers(x, layout), whole),
    }


def sum_rows(layout: TokenLayout, maps: int, repeats: int) -> list[common.Row]:
    """A row for each sum."""
    found: list[common.Row] = []
    for what, (function, array) in sums(layout, maps).items():
        calls: dict[str, Callable[[], Any]] = {}
        for way, options in {"with": {}, "without": without_ynnpack()}.items():
            compiled = jax.jit(function, compiler_options=options).lower(array).compile()
            calls[way] = functools.partial(compiled, array)
        times = common.take_turns(calls, repeats)
        found.append(_row(what, times))
    return found


def program_row(pixels: int, repeats: int) -> common.Row:
    """The program of `vi.analyze`, for one image."""
    model = vi.create_model("vit_s14", image_size=pixels)
    params, config = common.random_params(model), model.config
    image = jnp.zeros((1, *config.image_size, 3))
    calls: dict[str, Callable[[], Any]] = {}
    first = {}
    for way, options in {"with": {}, "without": without_ynnpack()}.items():
        told = (("leave_one_out",), tuple(range(config.depth)), None, config.layout)
        program = jax.jit(
            lambda params, image: _analyze._function(model, params, image, None, *told),  # noqa: B023
            compiler_options=options,
        )
        compiled = program.lower(params, image).compile()
        calls[way] = functools.partial(compiled, params, image)
        began = time.perf_counter()
        jax.block_until_ready(calls[way]())
        first[way] = 1e3 * (time.perf_counter() - began)
    row = _row(f"vi.analyze's program, {pixels} px", common.take_turns(calls, repeats))
    return {**row, "first_ms": first["with"], "own_first_ms": first["without"]}


def _row(what: str, times: dict[str, common.Times]) -> common.Row:
    given, own = times["with"], times["without"]
    return {"what": what, "ms": 1e3 * given.seconds, "own_ms": 1e3 * own.seconds,
            "ratio": given.ratio(own), "cpu_ratio": given.cpu_ratio(own)}  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--side", type=int, default=37, help="patches along a side of the grid")
    parser.add_argument("--maps", type=int, default=13, help="maps, as of twelve layers and all")
    parser.add_argument("--pixels", type=common.numbers, default=[224, 518], help="of an image")
    options = parser.parse_args()
    layout = TokenLayout(options.side, options.side, 1)
    report = common.Report("ynnpack", {"maps": options.maps, "patches": layout.num_patches})
    for row in sum_rows(layout, options.maps, options.repeats):
        report.add(**row)
    for pixels in options.pixels:
        report.add(**program_row(pixels, options.repeats))
    report.show(options.json)


if __name__ == "__main__":
    main()
