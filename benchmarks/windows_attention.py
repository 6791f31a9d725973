"""Time and products of attention within windows beside dense attention, on this machine.

    python -m benchmarks.windows_attention [--json] [--repeats 5] [--backward]
    python -m benchmarks.windows_attention --windows windows.npy   # yours: [..., P, 4], square
    python -m benchmarks.windows_attention --kernel pallas --dtype bfloat16 --batch 8   # on a GPU

One layer of ViT-S (6 heads of 64), random queries, keys and values. Windows are centred boxes
(moved inwards at the border) of the area that coverages 0.5, 0.75 and 0.9 of a smooth interaction
need, one that falls to 1/e over an eighth of the grid along each axis; and of a quarter of the
grid. That is the friendly case, as neighbours' windows overlap; `--windows` takes real ones,
which differ from patch to patch and so save less. Products are those of queries with keys,
computed over all N x N. Dense is measured twice: what this package's models use, which on a GPU is
cuDNN's flash attention when the type is bfloat16, and `jax.nn.dot_product_attention`, which makes
all weights. `faster` and `faster_than_jax` are their times over that of windows, the median over
turns in one process; `cpu_...` the same of the processor's time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from vit_interact.interactions.window_masks import window_area
from vit_interact.layout import TokenLayout
from vit_interact.models import pallas_boxes, pallas_windows
from vit_interact.models.fused import fused_attention
from vit_interact.models.window_attention import computed_share, window_attention

HEADS, WIDTH = 6, 64
GRIDS = ((224, 14), (518, 37), (1024, 64))
COVERAGES = (0.5, 0.75, 0.9)


def laplace_windows(layout: TokenLayout, coverage: float) -> np.ndarray:
    """Centred boxes that hold a coverage of a smooth interaction, the same size everywhere."""
    side = layout.rows
    # The share within h/2 of the centre is 1 - exp(-h / 2s) along each axis; both together hold it.
    scale = side / 8
    size = int(np.clip(round(-2 * scale * np.log(1 - np.sqrt(coverage))), 1, side))
    first = np.clip(layout.positions() - size // 2, 0, side - size)
    return np.concatenate([first, first + size], axis=1).astype(np.int32)


def box_windows(layout: TokenLayout, area: float) -> np.ndarray:
    """Centred boxes of a share of the grid."""
    size = max(1, round(layout.rows * area**0.5))
    first = np.clip(layout.positions() - size // 2, 0, layout.rows - size)
    return np.concatenate([first, first + size], axis=1).astype(np.int32)


def measure(
    layout: TokenLayout, windows: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Dense and windowed attention of one layer, and what the windows save."""
    functions, arguments = programs(layout, windows, options)
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    calls = {name: functools.partial(run, *arguments) for name, run in compiled.items()}
    times = common.take_turns(calls, options.repeats)
    ours, dense, other = (times[name] for name in ("windows", "dense", "jax"))
    return {
        **products(layout, windows, options),
        "dense_ms": 1e3 * dense.seconds,
        "jax_ms": 1e3 * other.seconds,
        "windows_ms": 1e3 * ours.seconds,
        "faster": dense.ratio(ours),
        "cpu_faster": dense.cpu_ratio(ours),
        "faster_than_jax": other.ratio(ours),
        "cpu_faster_than_jax": other.cpu_ratio(ours),
        "dense_mib": common.temporary_mib(compiled["dense"]),
        "windows_mib": common.temporary_mib(compiled["windows"]),
    }


def products(
    layout: TokenLayout, windows: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """What the windows are, and the products of queries with keys that are computed."""
    share = (
        computed_share(windows, layout)
        if options.kernel is None
        else _share_in_pallas(windows, layout, options.dtype)
    )
    return {
        "patches": layout.num_patches,
        "area": float(window_area(windows, layout).mean()),
        "products": float(share),
    }


def programs(
    layout: TokenLayout, windows: np.ndarray, options: argparse.Namespace
) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
    """Attention three ways, forward or both ways, and what it is given."""
    rng = np.random.default_rng(0)
    shape = (options.batch, layout.num_tokens, HEADS, WIDTH)
    query, key, value, grad = (jnp.asarray(rng.normal(size=shape), options.dtype) for _ in range(4))

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        if not options.backward:
            return lambda q, k, v, w, g: function(q, k, v, w)
        return lambda q, k, v, w, g: jax.vjp(lambda *x: function(*x, w), q, k, v)[1](g)

    functions = {
        "dense": whole(lambda q, k, v, w: fused_attention(q, k, v)),
        "jax": whole(lambda q, k, v, w: jax.nn.dot_product_attention(q, k, v, scale=1.0)),
        "windows": whole(lambda q, k, v, w: window_attention(q, k, v, w, layout, options.kernel)),
    }
    boxes = jnp.broadcast_to(jnp.asarray(windows), (options.batch, *windows.shape))
    return functions, (query / WIDTH**0.5, key, value, boxes, grad)


def _share_in_pallas(windows: np.ndarray, layout: TokenLayout, dtype: str) -> Any:
    if jax.default_backend() != "gpu":
        return pallas_windows.computed_share(windows, layout)
    if pallas_boxes.suitable_tiles(layout, jnp.dtype(dtype)) is None:
        return 1.0
    return pallas_boxes.computed_share(windows, layout, jnp.dtype(dtype))


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument("--windows", type=pathlib.Path, help="windows to time instead, a .npy file")
    parser.add_argument("--kernel", choices=("pallas",), help="instead of XLA; CPUs interpret it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1, help="images")
    options = parser.parse_args()
    fixed = {
        "heads": HEADS,
        "head_width": WIDTH,
        "dtype": options.dtype,
        "batch": options.batch,
        "kernel": options.kernel or "xla",
        "backward": options.backward,
    }
    report = common.Report("windows_attention", fixed)
    for what, layout, windows in _cases(options.windows):
        report.add(what=what, **measure(layout, windows, options))
    report.show(options.json)


def _cases(file: pathlib.Path | None) -> list[tuple[str, TokenLayout, np.ndarray]]:
    if file is not None:
        given = np.load(file)
        side = round(given.shape[-2] ** 0.5)
        return [
            (f"{file.stem} {number}", TokenLayout(side, side), one)
            for number, one in enumerate(given.reshape(-1, *given.shape[-2:]))
        ]
    cases = []
    for pixels, side in GRIDS:
        layout = TokenLayout(side, side)
        for coverage in COVERAGES:
            windows = laplace_windows(layout, coverage)
            cases.append((f"{pixels} px, coverage {coverage}", layout, windows))
        cases.append((f"{pixels} px, quarter", layout, box_windows(layout, 0.25)))
    return cases


if __name__ == "__main__":
    main()
