"""Windows from a survey: one for each patch and layer, for all images."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from vit_interact.interactions.windows import smallest_windows
from vit_interact.layout import TokenLayout
from vit_interact.survey.store import load_survey


def maps_of_kernel(
    kernel: Float[np.ndarray, "L offsets_r offsets_c"], layout: TokenLayout
) -> Float[np.ndarray, "L P P"]:
    """Rows of an indicator that has the same value at the same offset, wherever the query is.

    Args:
      kernel: mean impact at each (row, col) offset from the query, `[L, 2R - 1, 2C - 1]`.
      layout: the grid.
    """
    place = layout.positions()
    offset = place[None] - place[:, None]
    return np.asarray(kernel)[:, offset[..., 0] + layout.rows - 1, offset[..., 1] + layout.cols - 1]


def offset_windows(
    path: str | Path, layout: TokenLayout, indicator: str, coverage: float
) -> Int32[np.ndarray, "L P 4"]:
    """Smallest windows of the mean impact by offset that `vit-interact statistics` has found.

    Args:
      path: its store.
      layout: the grid of the model that gets the windows.
      indicator: that was surveyed.
      coverage: in (0, 1].

    Raises:
      ValueError: for a store of another grid or without the indicator.
    """
    design, statistics, _ = load_survey(path)
    if (design.layout.rows, design.layout.cols) != (layout.rows, layout.cols):
        raise ValueError(
            f"{path} is of a grid of {design.layout.rows}x{design.layout.cols}; expected "
            f"{layout.rows}x{layout.cols}"
        )
    if indicator not in design.indicators:
        raise ValueError(f"{path} has {', '.join(design.indicators)}, but no {indicator}")
    kernel = np.nan_to_num(np.asarray(statistics[f"{indicator}_kernel"].mean))
    maps = jnp.asarray(maps_of_kernel(kernel, layout))
    return np.asarray(smallest_windows(maps, layout, coverage))
