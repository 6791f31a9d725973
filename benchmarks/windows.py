"""Time of `smallest_windows` beside a sweep in NumPy, by size of the grid.

    python -m benchmarks.windows [--sides 8,16,24,37,64] [--maps 4] [--json]

Both run in the same process on the same maps; the sweep runs once, on one map, and beyond
`--sweep-up-to` patches not at all. `growth` is the exponent of P between this grid and the one
before. The sweep is the usual exact method: for every
(top, bottom) and left, a binary search for the right edge in the band's prefix sums. It is
vectorised over the bands and lefts of a query, and runs in float64. The share of equal windows is
printed too: only masses that float32 cannot tell from the coverage or from a tie bring it below 1.
"""

from __future__ import annotations

import time

import jax
import numpy as np

from benchmarks import common
from vit_interact.interactions.windows import smallest_windows
from vit_interact.layout import TokenLayout

SIDES = "8,16,24,37,64"
COVERAGE = 0.9


def sweep(rows: np.ndarray, layout: TokenLayout, coverage: float) -> np.ndarray:
    """The windows of one map, query by query; int `[P, 4]`."""
    grid = rows.astype(np.float64) / rows.sum(axis=1, keepdims=True, dtype=np.float64)
    prefix = np.zeros((layout.num_patches, layout.rows + 1, layout.cols + 1))
    maps = grid.reshape(-1, layout.rows, layout.cols)
    prefix[:, 1:, 1:] = maps.cumsum(axis=1).cumsum(axis=2)
    windows = np.empty((layout.num_patches, 4), np.int32)
    for query, (row, col) in enumerate(layout.positions()):
        top, bottom = np.mgrid[: row + 1, row + 1 : layout.rows + 1].reshape(2, -1)
        band = prefix[query, bottom] - prefix[query, top]
        left = np.broadcast_to(np.arange(col + 1), (len(top), col + 1))
        wanted = band[:, : col + 1] + coverage - 1e-6
        right = first_at_least(band, wanted, col + 1)
        mass = np.take_along_axis(band, right, axis=1) - band[:, : col + 1]
        area = (bottom - top)[:, None] * (right - left)
        area = np.where(mass >= coverage - 1e-6, area, 1 << 30)
        best = np.where(area == area.min(), mass, -1)
        tied = np.argwhere(best >= best.max() - 1e-6)
        windows[query] = min((top[b], a, bottom[b], right[b, a]) for b, a in tied)
    return windows


def first_at_least(band: np.ndarray, wanted: np.ndarray, start: int) -> np.ndarray:
    """The first column from `start` on whose prefix reaches each wanted mass, or the last."""
    low, high = np.full(wanted.shape, start), np.full(wanted.shape, band.shape[1] - 1)
    while (low < high).any():
        middle = (low + high) // 2
        reached = np.take_along_axis(band, middle, axis=1) >= wanted
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
        low = np.minimum(low, high)
    return low


def example(side: int, maps: int) -> np.ndarray:
    """Maps with a peak near the query over an uneven floor, float32 `[maps, P, P]`."""
    rng = np.random.default_rng(side)
    position = TokenLayout(side, side).positions()
    distance = np.linalg.norm(position[:, None] - position, axis=-1)
    floor = rng.random((maps, side * side, side * side)) ** 8
    return (floor + 3 * np.exp(-distance / 2)).astype(np.float32)


def measure(side: int, maps: int, repeats: int, sweep_up_to: int) -> common.Row:
    """One row: a grid of `side` x `side` patches."""
    layout = TokenLayout(side, side)
    indicator = example(side, maps)
    device = jax.device_put(indicator)
    search = jax.jit(lambda x: smallest_windows(x, layout, COVERAGE))
    began = time.perf_counter()
    compiled = search.lower(device).compile()
    compilation = time.perf_counter() - began
    times = common.take_turns({"ours": lambda: compiled(device)}, repeats)["ours"]
    row: common.Row = {
        "patches": layout.num_patches,
        "us_image": 1e6 * times.seconds / maps,
        "cpu_us_image": 1e6 * times.cpu_seconds / maps,
        "compile_s": compilation,
        "temporary_mib": common.temporary_mib(compiled),
    }
    if layout.num_patches <= sweep_up_to:
        began, used = time.perf_counter(), time.process_time()
        expected = sweep(indicator[0], layout, COVERAGE)
        row["sweep_us_image"] = 1e6 * (time.perf_counter() - began)
        row["cpu_ratio"] = row["cpu_us_image"] / (1e6 * (time.process_time() - used))
        windows = np.asarray(compiled(device))
        row["equal_windows"] = float((windows[0] == expected).all(axis=1).mean())
    return row


def main() -> None:
    """Prints the table, or one JSON object."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--sides", type=common.numbers, default=common.numbers(SIDES))
    parser.add_argument("--maps", type=int, default=4, help="maps in a batch")
    parser.add_argument("--sweep-up-to", type=int, default=1369, help="patches")
    options = parser.parse_args()
    report = common.Report(
        "windows", {"coverage": COVERAGE, "maps": options.maps, "dtype": "float32"}
    )
    for side in options.sides:
        report.add(**measure(side, options.maps, options.repeats, options.sweep_up_to))
    common.add_growth(report.rows, "cpu_us_image")
    report.show(options.json)


if __name__ == "__main__":
    main()
