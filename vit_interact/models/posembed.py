"""Position embeddings for another grid, resized as the library that made them does it.

Every method is separable and linear: a matrix for rows and a matrix for columns, built in float64.
The matrices reproduce

* `bicubic_antialias`: `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`, which
  timm and Hugging Face's DINOv2 with registers use: Keys' kernel with `a = -0.5`, widened when the
  grid shrinks, cut off and renormalised at the border;
* `bicubic`: the same call without `antialias`, which Hugging Face's ViT, DeiT, DINOv2 and CLIP
  use: `a = -0.75`, border rows repeated;
* `bilinear`: `scipy.ndimage.zoom(order=1)`, which augreg and big_vision use: corners stay corners.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Method = Literal["bicubic_antialias", "bicubic", "bilinear"]


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel, zero beyond a distance of 2."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _bicubic_antialias(old: int, new: int) -> np.ndarray:
    stretch = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * (old / new)
    weights = _cubic((np.arange(old) + 0.5 - centres[:, None]) / stretch, a=-0.5)
    # The window is a whole number of rows, rounded as torch rounds it.
    first = np.floor(centres - 2 * stretch + 0.5)[:, None]
    last = np.floor(centres + 2 * stretch + 0.5)[:, None]
    weights = np.where((np.arange(old) >= first) & (np.arange(old) < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _bicubic(old: int, new: int) -> np.ndarray:
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        source = np.floor(centres) + offset
        column = np.clip(source, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), column), _cubic(centres - source, a=-0.75))
    return weights


def _bilinear(old: int, new: int) -> np.ndarray:
    positions = np.arange(new) * ((old - 1) / (new - 1)) if new > 1 else np.zeros(1)
    return np.maximum(0.0, 1.0 - np.abs(np.arange(old) - positions[:, None]))


_MATRICES: dict[str, Callable[[int, int], np.ndarray]] = {
    "bicubic_antialias": _bicubic_antialias,
    "bicubic": _bicubic,
    "bilinear": _bilinear,
}


def resize_position_embedding(
    pos: Float[Array, "1 old_rows D"] | Float[np.ndarray, "1 old_rows D"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int = 0,
    method: Method = "bicubic_antialias",
) -> Float[Array, "1 new_rows D"]:
    """Resizes the patches' part of a position embedding; rows of prefix tokens stay as they are.

    Args:
      pos: `[1, prefix + R*C, D]`, patches row-major after the prefix tokens' rows.
      old_grid: `(R, C)` of `pos`.
      new_grid: `(R, C)` of the result.
      prefix: rows in front of the patches' rows.
      method: `bicubic_antialias`, `bicubic` or `bilinear`; the module says which library uses
        which. DINOv2's own code shifts the scale by 0.1 patch in its plain bicubic; timm and
        Hugging Face do not, nor does this.

    Returns:
      `[1, prefix + R'*C', D]` of the dtype of `pos`; `pos` itself when the grids are equal.

    Raises:
      ValueError: when `pos` has not `prefix + R*C` rows, or for an unknown method.
    """
    rows = prefix + old_grid[0] * old_grid[1]
    if pos.shape[1] != rows:
        raise ValueError(
            f"the position embedding has {pos.shape[1]} rows; a grid of "
            f"{old_grid[0]}x{old_grid[1]} and {prefix} prefix tokens need {rows}"
        )
    if method not in _MATRICES:
        raise ValueError(f"method={method!r}: expected one of {get_args(Method)}")
    if old_grid == new_grid:
        return jnp.asarray(pos)
    matrix = _MATRICES[method]
    dtype = jnp.promote_types(pos.dtype, jnp.float32)
    by_row = jnp.asarray(matrix(old_grid[0], new_grid[0]), dtype)
    by_col = jnp.asarray(matrix(old_grid[1], new_grid[1]), dtype)
    grid = jnp.asarray(pos[0, prefix:], dtype).reshape(*old_grid, -1)
    grid = jnp.einsum("rp,cq,pqd->rcd", by_row, by_col, grid, precision="highest")
    patches = grid.reshape(1, -1, grid.shape[-1]).astype(pos.dtype)
    return jnp.concatenate([jnp.asarray(pos[:, :prefix]), patches], axis=1)


def sincos_position_embedding(grid: tuple[int, int], width: int) -> Float[np.ndarray, "1 P D"]:
    """The fixed `sincos2d` embedding that big_vision adds when a file holds no learned one.

    Args:
      grid: `(R, C)`.
      width: `D`, a multiple of 4.

    Returns:
      `[1, R*C, D]` float32: sine and cosine of the column, then of the row, with wave lengths
      from `2 pi` to `20000 pi` patches (MoCo v3, as big_vision has it).

    Raises:
      ValueError: when the width is no multiple of 4.
    """
    if width % 4 or width < 8:
        raise ValueError(f"width {width}: sine-cosine positions need a multiple of 4, at least 8")
    row, col = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1)
    frequency = 10_000.0 ** -np.linspace(0.0, 1.0, width // 4)
    waves = [f(axis * frequency) for axis in (col, row) for f in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1, dtype=np.float32, casting="same_kind")[None]
