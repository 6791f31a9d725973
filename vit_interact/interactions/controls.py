"""Control windows of the same area: what an adaptive window has to beat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from vit_interact.layout import TokenLayout

Windows = Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"]


def centred_windows(windows: Windows, layout: TokenLayout) -> Int32[Array, "*batch P 4"]:
    """Boxes of the same height and width around each query, shifted to lie inside the grid.

    Args:
      windows: (top, left, bottom, right) `[..., P, 4]`, exclusive at the end.
      layout: the grid.
    """
    rows, cols, height, width = _sizes(windows, layout)
    top = jnp.clip(rows - (height - 1) // 2, 0, layout.rows - height)
    left = jnp.clip(cols - (width - 1) // 2, 0, layout.cols - width)
    return _boxes(top, left, height, width)


def random_windows(windows: Windows, layout: TokenLayout, key: Array) -> Int32[Array, "*batch P 4"]:
    """Boxes of the same height and width at a random place that contains the query.

    Args:
      windows: (top, left, bottom, right) `[..., P, 4]`, exclusive at the end.
      layout: the grid.
      key: a jax random key.
    """
    rows, cols, height, width = _sizes(windows, layout)
    vertical, horizontal = jax.random.split(key)
    top = _between(vertical, rows - height + 1, rows, layout.rows - height)
    left = _between(horizontal, cols - width + 1, cols, layout.cols - width)
    return _boxes(top, left, height, width)


def lowest_windows(
    patch_indicator: Float[Array, "*batch P P"] | Float[np.ndarray, "*batch P P"],
    windows: Windows,
    layout: TokenLayout,
) -> Int32[Array, "*batch P 4"]:
    """Of all boxes with the same area that contain the query, the one with the least mass.

    Every height and width of that area is tried at every place. Of equal masses the first found
    wins: smallest height, then smallest top, then left.

    Args:
      patch_indicator: patch-to-patch indicator `[..., P, P]`, query first.
      windows: (top, left, bottom, right) `[..., P, 4]`, exclusive at the end.
      layout: the grid.
    """
    layout.check_patches(np.shape(patch_indicator), "patch_indicator")
    patches = layout.num_patches
    _, _, height, width = _sizes(windows, layout)
    maps = jnp.asarray(patch_indicator, jnp.float32).reshape(-1, patches, patches)
    areas = (height * width).reshape(-1, patches)
    found = lax.map(lambda one: _lowest(one[0], one[1], layout), (maps, areas))
    return found.reshape(windows.shape)


def _lowest(
    rows_of_map: Float[Array, "P P"], area: Int32[Array, " P"], layout: TokenLayout
) -> Int32[Array, "P 4"]:
    rows, cols, patches = layout.rows, layout.cols, layout.num_patches
    total = jnp.cumsum(jnp.cumsum(rows_of_map.reshape(patches, rows, cols), axis=1), axis=2)
    # Padded by a whole grid at the end, so that a slice of any size starts inside.
    total = jnp.pad(total, ((0, 0), (1, rows), (1, cols)))
    row, col = (jnp.asarray(a)[:, None, None] for a in np.divmod(np.arange(patches), cols))
    top, left = jnp.arange(rows)[:, None], jnp.arange(cols)

    def corner(h: Array | int, w: Array | int) -> Array:
        return lax.dynamic_slice(total, (0, h, w), (patches, rows, cols))

    def try_size(best: tuple[Array, Array], size: Array) -> tuple[tuple[Array, Array], None]:
        h, w = size
        mass = corner(h, w) - corner(h, 0) - corner(0, w) + corner(0, 0)  # box at (top, left)
        holds = (top <= row) & (row < top + h) & (top + h <= rows)
        holds &= (left <= col) & (col < left + w) & (left + w <= cols)
        mass = jnp.where(holds, mass, jnp.inf).reshape(patches, -1)
        place = mass.argmin(axis=-1)
        mass = mass.min(axis=-1)
        mass = jnp.where(h * w == area, mass, jnp.inf)
        box = jnp.stack([place // cols, place % cols, place // cols + h, place % cols + w], axis=-1)
        better = mass < best[0]
        return (
            jnp.where(better, mass, best[0]),
            jnp.where(better[:, None], box.astype(jnp.int32), best[1]),
        ), None

    sizes = jnp.asarray(np.argwhere(np.ones((rows, cols))) + 1)  # every (height, width)
    start = (jnp.full(patches, jnp.inf), jnp.zeros((patches, 4), jnp.int32))
    return lax.scan(try_size, start, sizes)[0][1]


def grid_windows(windows: Windows, layout: TokenLayout) -> Int32[Array, "*batch P 4"]:
    """A fixed grid of tiles whose mean area over queries is nearest to that of the windows.

    Each query's window is its tile. Tiles are at most twice as long as wide; those at the lower and
    right border are cut off by it, which their mean area accounts for.

    Args:
      windows: (top, left, bottom, right) `[..., P, 4]`, exclusive at the end.
      layout: the grid.
    """
    rows, cols, height, width = _sizes(windows, layout)
    sizes, areas = _tilings(layout)
    target = (height * width).astype(jnp.float32).mean(axis=-1)  # [...]
    best = jnp.abs(target[..., None] - areas).argmin(axis=-1)
    h, w = (jnp.asarray(sizes)[best][..., None, axis] for axis in (0, 1))
    top, left = rows // h * h, cols // w * w
    bottom, right = jnp.minimum(top + h, layout.rows), jnp.minimum(left + w, layout.cols)
    return jnp.stack([top, left, bottom, right], axis=-1).astype(jnp.int32)


def local_windows(size: tuple[int, int], layout: TokenLayout) -> Int32[Array, "P 4"]:
    """Boxes of one size around each query, shifted to lie inside the grid.

    Args:
      size: (height, width) in patches; cut to the grid.
      layout: the grid.

    Raises:
      ValueError: for a size below 1.
    """
    height, width = _checked_size(size, layout)
    return centred_windows(np.tile([0, 0, height, width], (layout.num_patches, 1)), layout)


def shifted_windows(
    size: tuple[int, int], layout: TokenLayout, shift: tuple[int, int] = (0, 0)
) -> Int32[Array, "P 4"]:
    """A grid of tiles of one size that do not overlap, moved up and to the left.

    Layers that take turns with no shift and a shift of half a tile pass on what each sees, as in
    Swin (Liu et al. 2021); here tiles at the border are cut off and do not wrap around.

    Args:
      size: (height, width) of a tile in patches; cut to the grid.
      layout: the grid.
      shift: (rows, cols) of the move.

    Raises:
      ValueError: for a size below 1.
    """
    tile = np.array(_checked_size(size, layout))
    first = (layout.positions() + np.array(shift)) // tile * tile - np.array(shift)
    most = np.array([layout.rows, layout.cols])
    corners = np.concatenate([np.maximum(first, 0), np.minimum(first + tile, most)], axis=1)
    return jnp.asarray(corners, jnp.int32)


def _checked_size(size: tuple[int, int], layout: TokenLayout) -> tuple[int, int]:
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"a window of {height}x{width} patches: expected at least 1x1")
    return min(height, layout.rows), min(width, layout.cols)


def _tilings(layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    """Tile sizes `[S, 2]` and their mean area over queries `[S]`."""

    def mean_length(tile: int, side: int) -> float:
        starts = np.arange(side) // tile * tile
        return float((np.minimum(starts + tile, side) - starts).mean())

    shape = layout.rows / layout.cols
    sizes = [
        (h, w)
        for h in range(1, layout.rows + 1)
        for w in range(1, layout.cols + 1)
        if max(h, w) <= 2 * min(h, w) or 0.5 <= h / w / shape <= 2
    ]
    areas = [mean_length(h, layout.rows) * mean_length(w, layout.cols) for h, w in sizes]
    return np.array(sizes, np.int32), np.array(areas, np.float32)


def _sizes(windows: Windows, layout: TokenLayout) -> tuple[Array, Array, Array, Array]:
    """Row and column of each query, height and width of its window."""
    layout_patches = layout.num_patches
    if np.shape(windows)[-2:] != (layout_patches, 4):
        raise ValueError(
            f"windows have shape {np.shape(windows)}; expected [..., {layout_patches}, 4]"
        )
    boxes = jnp.asarray(windows)
    rows, cols = (jnp.asarray(a) for a in np.divmod(np.arange(layout_patches), layout.cols))
    return rows, cols, boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def _between(key: Array, low: Array, high: Array, limit: Array) -> Array:
    """Uniform whole numbers from `max(low, 0)` to `min(high, limit)`, both included."""
    return jax.random.randint(key, low.shape, jnp.maximum(low, 0), jnp.minimum(high, limit) + 1)


def _boxes(top: Array, left: Array, height: Array, width: Array) -> Int32[Array, "*batch P 4"]:
    return jnp.stack([top, left, top + height, left + width], axis=-1).astype(jnp.int32)
