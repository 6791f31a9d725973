"""Time of `smallest_windows` beside a sweep in NumPy, by size of the grid.

    python -m benchmarks.windows [--json] [--repeats 5] [--maps 4]

Both run in the same process on the same maps. The sweep is the usual exact method: for every
(top, bottom) and left, a binary search for the right edge in the band's prefix sums. It is
vectorised over the bands and lefts of a query, and runs in float64. The share of equal windows is
printed too: only masses that float32 cannot tell from the coverage or from a tie bring it below 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time

import jax
import numpy as np

from vit_interact.interactions.windows import smallest_windows
from vit_interact.layout import TokenLayout

GRIDS = (8, 16, 24, 37)
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


def measure(side: int, maps: int, repeats: int) -> dict[str, float]:
    """Milliseconds a map for both, best of `repeats` (the sweep runs once, on one map)."""
    layout = TokenLayout(side, side)
    indicator = example(side, maps)
    device = jax.device_put(indicator)
    search = jax.jit(lambda x: smallest_windows(x, layout, COVERAGE))
    began = time.perf_counter()
    compiled = search.lower(device).compile()
    compilation = time.perf_counter() - began
    memory = compiled.memory_analysis()
    windows = np.asarray(compiled(device))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(device))
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    expected = sweep(indicator[0], layout, COVERAGE)
    swept = time.perf_counter() - began
    return {
        "side": side,
        "ms_per_map": 1e3 * min(times) / maps,
        "sweep_ms_per_map": 1e3 * swept,
        "compile_seconds": compilation,
        "temporary_mib": memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
        "equal_windows": float((windows[0] == expected).all(axis=1).mean()),
    }


def main() -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--maps", type=int, default=4, help="maps in a batch")
    options = parser.parse_args()
    setting = {
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "coverage": COVERAGE,
        "maps": options.maps,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    results = [measure(side, options.maps, options.repeats) for side in GRIDS]
    if options.json:
        print(json.dumps({**setting, "results": results}))
        return
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    print(f"{'grid':>7} {'ms/map':>9} {'sweep':>9} {'faster':>7} {'compile s':>9} {'MiB':>6} equal")
    for line in results:
        faster = line["sweep_ms_per_map"] / line["ms_per_map"]
        print(
            f"{line['side']:>3}x{line['side']:<3} {line['ms_per_map']:9.3f} "
            f"{line['sweep_ms_per_map']:9.1f} {faster:6.0f}x {line['compile_seconds']:9.2f} "
            f"{line['temporary_mib']:6.1f} {line['equal_windows']:.4f}"
        )


if __name__ == "__main__":
    main()
