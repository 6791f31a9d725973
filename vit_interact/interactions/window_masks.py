"""What windows hold: as masks of attention, areas, and how many of them hold a patch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.layout import TokenLayout


def window_mask(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"], layout: TokenLayout
) -> Bool[Array, "*batch N N"]:
    """Boolean attention mask of windows: prefix tokens see and are seen by all.

    Args:
      windows: (top, left, bottom, right) of each query patch `[..., P, 4]`, exclusive at the end.
      layout: the grid of patches and the prefix tokens.

    Returns:
      `[..., N, N]`, True where the query (second last axis) may attend to the key (last axis).
    """
    prefix = [(layout.prefix, 0), (layout.prefix, 0)]
    inside = patches_in_windows(windows, layout)
    return jnp.pad(inside, [(0, 0)] * (inside.ndim - 2) + prefix, constant_values=True)


@partial(jax.jit, static_argnames="layout")
def window_area(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"], layout: TokenLayout
) -> Float[Array, "*batch P"]:
    """The area of each window as a share of the grid.

    Args:
      windows: (top, left, bottom, right) of each query patch `[..., P, 4]`, exclusive at the end.
      layout: the grid of patches.

    Returns:
      `[..., P]` float32 in (0, 1].
    """
    top, left, bottom, right = jnp.moveaxis(jnp.asarray(windows), -1, 0)
    return ((bottom - top) * (right - left)).astype(jnp.float32) / layout.num_patches


def coverage_map(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"], layout: TokenLayout
) -> Float[Array, "*batch P"]:
    """How many windows hold each patch, as a share of all: `f_j = #{i : j in W_i} / P`.

    Args:
      windows: (top, left, bottom, right) of each query patch `[..., P, 4]`, exclusive at the end.
      layout: the grid of patches.

    Returns:
      `[..., P]` float32 in (0, 1]: each patch is in its own window at least.

    Raises:
      ValueError: if there is not one window a patch.
    """
    held = patches_in_windows(windows, layout).sum(axis=-2, dtype=jnp.int32)
    return held.astype(jnp.float32) / layout.num_patches


def patches_in_windows(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"], layout: TokenLayout
) -> Bool[Array, "*batch P P"]:
    """Which patches each window holds.

    Args:
      windows: (top, left, bottom, right) of each query patch `[..., P, 4]`, exclusive at the end.
      layout: the grid of patches.

    Returns:
      `[..., P, P]`, True where the patch of the last axis lies in the window of the second last.

    Raises:
      ValueError: if there is not one window a patch.
    """
    if np.shape(windows)[-2:] != (layout.num_patches, 4):
        raise ValueError(
            f"windows have shape {np.shape(windows)}, but {layout} has {layout.num_patches} "
            f"patches: expected [..., {layout.num_patches}, 4]"
        )
    row, col = jnp.asarray(layout.positions()).T
    top, left, bottom, right = jnp.moveaxis(jnp.asarray(windows), -1, 0)[..., None]
    return (top <= row) & (row < bottom) & (left <= col) & (col < right)
