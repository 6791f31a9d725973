"""Boxes of real sides around patches: what a window-free transformer predicts and is taught by.

A query patch in row `r` and column `c` has four distances `d = (top, left, bottom, right)`, not
negative, in patches. Its box runs from `r − d_t` to `r + d_b + 1` and from `c − d_l` to
`c + d_r + 1`: with all distances 0 it is the patch itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from vit_interact.layout import TokenLayout

Distances = Float[Array, "*batch P 4"]


class SoftWindow(NamedTuple):
    """Logarithm of a soft window, as a sum of a row and a column factor.

    Attributes:
      rows: `[..., P, R]`; the factor of every key in that row.
      cols: `[..., P, C]`.
    """

    rows: Float[Array, "*batch P R"]
    cols: Float[Array, "*batch P C"]


def soft_window(
    distances: Distances, layout: TokenLayout, sharpness: Float[Array, ""] | float = 1.0
) -> SoftWindow:
    """The soft box (docs/method.md), separable: `log m_ij = rows_i[r_j] + cols_i[c_j]`.

    Args:
      distances: (top, left, bottom, right) of each query patch, in patches.
      layout: the grid.
      sharpness: `τ` in patches: the width of the border; towards 0 the box becomes that of
        `hard_windows`.
    """
    place = layout.positions()
    rows = np.arange(layout.rows) - place[:, :1]
    cols = np.arange(layout.cols) - place[:, 1:]

    def factor(offset: np.ndarray, before: Array, after: Array) -> Array:
        start = (offset + before[..., None] + 0.5) / sharpness
        end = (after[..., None] + 0.5 - offset) / sharpness
        return jax.nn.log_sigmoid(start) + jax.nn.log_sigmoid(end)

    top, left, bottom, right = (distances[..., side] for side in range(4))
    return SoftWindow(factor(rows, top, bottom), factor(cols, left, right))


def unclipped_boxes(distances: Distances, layout: TokenLayout) -> Float[Array, "*batch P 4"]:
    """(top, left, bottom, right) of each box, bottom and right exclusive, beyond the grid too.

    Args:
      distances: (top, left, bottom, right) of each query patch, in patches.
      layout: the grid.
    """
    place = layout.positions()
    corners = np.concatenate([place, place + 1], axis=1)
    return jnp.asarray(corners) + distances * np.array([-1, -1, 1, 1])


def hard_windows(distances: Distances, layout: TokenLayout) -> Int32[Array, "*batch P 4"]:
    """The windows that soft boxes become as they sharpen: all keys within `floor(d + ½)`.

    Args:
      distances: (top, left, bottom, right) of each query patch, in patches.
      layout: the grid.

    Returns:
      Windows as `smallest_windows` gives them, clipped to the grid.
    """
    reach = jnp.floor(distances + 0.5)
    boxes = unclipped_boxes(reach, layout)
    most = np.array([layout.rows, layout.cols] * 2)
    return jnp.clip(boxes, 0, most).astype(jnp.int32)


def clipped_boxes(distances: Distances, layout: TokenLayout) -> Float[Array, "*batch P 4"]:
    """(top, left, bottom, right) of the part of each box that lies on the grid.

    Args:
      distances: (top, left, bottom, right) of each query patch, in patches.
      layout: the grid.
    """
    most = np.array([layout.rows, layout.cols] * 2, np.float32)
    return jnp.clip(unclipped_boxes(distances, layout), 0, most)


def box_area(boxes: Float[Array, "*batch 4"]) -> Float[Array, "*batch"]:
    """Area of (top, left, bottom, right) boxes in patches; 0 where an end is before its start."""
    return jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def iou(
    boxes: Float[Array, "*batch 4"], others: Float[Array, "*batch 4"]
) -> Float[Array, "*batch"]:
    """Intersection over union, in [0, 1]; 0 for boxes without area.

    Args:
      boxes: (top, left, bottom, right), bottom and right exclusive.
      others: alike.
    """
    inter, union = _overlap(boxes, others)
    return inter / jnp.where(union > 0, union, 1)


def giou(
    boxes: Float[Array, "*batch 4"], others: Float[Array, "*batch 4"]
) -> Float[Array, "*batch"]:
    """Generalised intersection over union (Rezatofighi et al. 2019), in (−1, 1].

    1 for equal boxes; below 0 for boxes far apart. Boxes without area count as points or lines: two
    equal ones give 0. Gradients are finite everywhere.

    Args:
      boxes: (top, left, bottom, right), bottom and right exclusive.
      others: alike.
    """
    inter, union = _overlap(boxes, others)
    starts = jnp.minimum(boxes[..., :2], others[..., :2])
    ends = jnp.maximum(boxes[..., 2:], others[..., 2:])
    hull = box_area(jnp.concatenate([starts, ends], axis=-1))
    shared = inter / jnp.where(union > 0, union, 1)
    return shared - (hull - union) / jnp.where(hull > 0, hull, 1)


def _overlap(boxes: Array, others: Array) -> tuple[Array, Array]:
    """Areas of intersection and union."""
    starts = jnp.maximum(boxes[..., :2], others[..., :2])
    ends = jnp.minimum(boxes[..., 2:], others[..., 2:])
    inter = box_area(jnp.concatenate([starts, ends], axis=-1))
    return inter, box_area(boxes) + box_area(others) - inter


def window_guidance(
    distances: Distances,
    windows: Int32[Array, "*batch P 4"],
    layout: TokenLayout,
    counts: Bool[Array, "*batch P"] | None = None,
) -> Float[Array, "*batch"]:
    """How far predicted boxes are from windows: mean over patches of `1 − gIoU`, in [0, 2).

    Boxes are not clipped to the grid: clipped, those that hold the whole grid, as all do before
    training, would have no gradient.

    Args:
      distances: (top, left, bottom, right) that are predicted for each patch.
      windows: to learn from, as `smallest_windows` gives them; no gradient flows into them.
      layout: the grid.
      counts: patches to learn from; leave out those whose row of the indicator is zero, since their
        windows are there by definition only. None takes all.

    Returns:
      The loss, 0 where no patch counts.
    """
    goal = jax.lax.stop_gradient(windows.astype(distances.dtype))
    losses = 1 - giou(unclipped_boxes(distances, layout), goal)
    if counts is None:
        return jnp.mean(losses, axis=-1)
    total = jnp.sum(counts, axis=-1)
    return jnp.sum(jnp.where(counts, losses, 0), axis=-1) / jnp.maximum(total, 1)
