"""Time of `responsive_field` beside plain NumPy, by size of the grid.

    python -m benchmarks.fields [--sides 8,16,24,37,64] [--maps 4] [--json]

Both take turns in one process on the same maps. NumPy computes in float64 with the grid's
coordinates, as one writes it down from docs/method.md: moments, covariance, eigenvalues, entropy.
`growth` is the exponent of P between this grid and the one before; a map has P squared entries.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from benchmarks import common
from benchmarks.windows import example
from vit_interact.interactions.fields import responsive_field
from vit_interact.layout import TokenLayout

SIDES = "8,16,24,37,64"


def plain(maps: np.ndarray, layout: TokenLayout) -> dict[str, np.ndarray]:
    """The fields of `[M, P, P]` without zero rows, in float64."""
    weights = maps.astype(np.float64)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    place = layout.positions().astype(np.float64)
    mean = weights @ place  # [M, P, 2]
    square = np.einsum("mij,ja,jb->miab", weights, place, place, optimize=True)
    covariance = square - mean[..., :, None] * mean[..., None, :]
    values = np.linalg.eigvalsh(covariance)[..., ::-1].clip(min=0)
    tendency = mean - place
    log = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return {
        "tendency": tendency,
        "spread": np.sqrt((tendency**2).sum(-1) + np.trace(covariance, axis1=-2, axis2=-1)),
        "axes": np.sqrt(values),
        "entropy": -(weights * log).sum(-1) / math.log(layout.num_patches),
    }


def measure(side: int, maps: int, repeats: int) -> common.Row:
    """One row: a grid of `side` x `side` patches."""
    layout = TokenLayout(side, side)
    indicator = example(side, maps)
    device = jax.device_put(indicator)
    compiled = jax.jit(lambda x: responsive_field(x, layout)).lower(device).compile()
    times = common.take_turns(
        {"ours": lambda: compiled(device), "numpy": lambda: plain(indicator, layout)}, repeats
    )
    found: Any = compiled(device)
    expected = plain(indicator, layout)
    return {
        "patches": side * side,
        "us_image": 1e6 * times["ours"].seconds / maps,
        "cpu_us_image": 1e6 * times["ours"].cpu_seconds / maps,
        "numpy_us_image": 1e6 * times["numpy"].seconds / maps,
        "ratio": times["ours"].ratio(times["numpy"]),
        "cpu_ratio": times["ours"].cpu_ratio(times["numpy"]),
        "temporary_mib": common.temporary_mib(compiled),
        "difference": max(
            float(np.abs(np.asarray(getattr(found, name)) - value).max() / np.abs(value).max())
            for name, value in expected.items()
        ),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--sides", type=common.numbers, default=common.numbers(SIDES))
    parser.add_argument("--maps", type=int, default=4, help="maps in a batch")
    options = parser.parse_args()
    report = common.Report("fields", {"maps": options.maps, "dtype": "float32"})
    for side in options.sides:
        report.add(**measure(side, options.maps, options.repeats))
    common.add_growth(report.rows, "cpu_us_image")
    report.show(options.json)


if __name__ == "__main__":
    main()
