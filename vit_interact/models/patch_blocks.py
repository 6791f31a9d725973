"""Compact blocks of patches, and which of them windows reach into."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from vit_interact.layout import TokenLayout

SIZE = 256
"""Patches in a block on a CPU. Larger blocks multiply faster (of 32, products take twice as long or
more), but the union of a block's windows grows with them; sizes that fill no vectors are slow, too.
"""


class PatchBlocks(NamedTuple):
    """Which patches each block holds.

    Attributes:
      patches: numbers of the patches `[blocks, S]`; 0 where there is none.
      real: which of them are `[blocks, S]`.
      box: (top, left, bottom, right) around each block, exclusive at the end, `[blocks, 4]`.
    """

    patches: Int[np.ndarray, "blocks S"]
    real: Bool[np.ndarray, "blocks S"]
    box: Int[np.ndarray, "blocks 4"]


@functools.cache
def patch_blocks(layout: TokenLayout, size: int = SIZE) -> PatchBlocks:
    """Cuts a grid of any size into compact blocks of `size` patches; only the last is filled up.

    They are stretches of a Hilbert curve through the smallest square of a power of two that holds
    the grid. Rectangular tiles are the same blocks on a grid of 64x64, but on one of 37x37 their
    filling at the border costs a tenth to a third more products.
    """
    row, col = layout.positions().T
    place = np.argsort(np.argsort(hilbert(row, col)))
    block = place // size
    count = block.max() + 1
    patches, real = np.zeros((count, size), np.int32), np.zeros((count, size), bool)
    box = np.empty((count, 4), np.int32)
    for number in range(count):
        inside = np.flatnonzero(block == number)
        patches[number, : len(inside)], real[number, : len(inside)] = inside, True
        rows, cols = row[inside], col[inside]
        box[number] = rows.min(), cols.min(), rows.max() + 1, cols.max() + 1
    return PatchBlocks(patches, real, box)


def hilbert(row: Int[np.ndarray, " P"], col: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """Places along the Hilbert curve through the smallest enclosing square of a power of two."""
    x, y = np.array(col, np.int64), np.array(row, np.int64)
    side = 1 << int(max(x.max(), y.max())).bit_length()
    place = np.zeros_like(x)
    half = side // 2
    while half:
        right, lower = (x & half) > 0, (y & half) > 0
        place += half * half * ((3 * right) ^ lower)
        # Turn the quarter so that its curve starts where the last one ended.
        flip = ~lower & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(lower, x, y), np.where(lower, y, x)
        half //= 2
    return place


def needed_blocks(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"],
    layout: TokenLayout,
    size: int = SIZE,
) -> Bool[Array, "*batch blocks blocks"]:
    """Which blocks of keys (last axis) the windows of each block of queries reach into."""
    blocks = patch_blocks(layout, size)
    top, left, bottom, right = jnp.moveaxis(jnp.asarray(windows), -1, 0)[..., None]
    first_row, first_col, last_row, last_col = blocks.box.T
    reached = (top < last_row) & (first_row < bottom) & (left < last_col) & (first_col < right)
    # Patch 0 fills up blocks; its window must not count there.
    by_block = reached[..., blocks.patches, :] & blocks.real[..., None]
    return by_block.any(axis=-2)
