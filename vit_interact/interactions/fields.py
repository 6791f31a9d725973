"""The responsive field of each patch: where its interaction lies, how far and in which shape."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from vit_interact.interactions.windows import unit_rows
from vit_interact.layout import TokenLayout

_POINT = 1e-12  # patches^2: fields with no more variance than this have no shape


class ResponsiveField(NamedTuple):
    """What one row of an indicator says about its query patch. Rows of zeros are NaN in all fields.

    Attributes:
      tendency: mean displacement (rows, columns) from the query `[..., P, 2]`, in patches.
      spread: root mean square distance from the query `[..., P]`, in patches.
      axes: standard deviation about the mean along the major and the minor axis `[..., P, 2]`, in
        patches.
      angle: direction of the major axis `[..., P]`, in radians in (-pi/2, pi/2], from +column
        towards +row; 0 where the axes are equal or below 1e-6 patches.
      eccentricity: `sqrt(1 - minor^2 / major^2)` `[..., P]`; 0 where the major axis
        is below 1e-6 patches.
      entropy: entropy of the row over `log P` `[..., P]`: 0 for one patch, 1 for all alike.
    """

    tendency: Float[Array, "*batch P 2"]
    spread: Float[Array, "*batch P"]
    axes: Float[Array, "*batch P 2"]
    angle: Float[Array, "*batch P"]
    eccentricity: Float[Array, "*batch P"]
    entropy: Float[Array, "*batch P"]


@partial(jax.jit, static_argnames="layout")
def responsive_field(
    patch_indicator: Float[Array, "*batch P P"] | Float[np.ndarray, "*batch P P"],
    layout: TokenLayout,
) -> ResponsiveField:
    """Moments, principal axes and entropy of each row of the indicator over the patch grid.

    All in float32. Deviations are taken before they are squared, and every variance is a sum of
    non-negative terms, so nothing cancels on large grids; `spread^2` is `|tendency|^2` plus the
    trace of the covariance. Gradients are finite everywhere, also for rows of zeros.

    Args:
      patch_indicator: non-negative patch-to-patch indicator `[..., P, P]`, query first. Rows need
        not be normalised.
      layout: the grid of patches.

    Returns:
      The fields of all query patches.

    Raises:
      ValueError: if the shape is not the layout's.
    """
    layout.check_patches(np.shape(patch_indicator), "patch_indicator")
    return fields_of_rows(jnp.asarray(patch_indicator), layout.positions(), layout)


def fields_of_rows(
    rows: Float[Array, "*batch M P"],
    query: Int32[Array, "M 2"] | Int32[np.ndarray, "M 2"],
    layout: TokenLayout,
) -> ResponsiveField:
    """`responsive_field` for some queries only.

    Args:
      rows: rows of a non-negative patch-to-patch indicator `[..., M, P]`.
      query: (row, col) of the queries, `[M, 2]`, in patches.
      layout: the grid of patches.
    """
    weights, usable = unit_rows(rows)
    grid = weights.reshape(*weights.shape[:-1], layout.rows, layout.cols)
    query = jnp.asarray(query, jnp.float32)

    # Offsets from the query, then from the mean: [..., M, R] and [..., M, C].
    row = np.arange(layout.rows, dtype=np.float32) - query[:, :1]
    col = np.arange(layout.cols, dtype=np.float32) - query[:, 1:]
    of_row, of_col = grid.sum(axis=-1), grid.sum(axis=-2)
    mean_row, mean_col = (of_row * row).sum(axis=-1), (of_col * col).sum(axis=-1)
    row, col = row - mean_row[..., None], col - mean_col[..., None]
    var_row, var_col = (of_row * row**2).sum(axis=-1), (of_col * col**2).sum(axis=-1)
    # Both axes at once: as two sums, XLA's CPU compiler makes it one loop that is slow.
    covariance = (grid * (row[..., None] * col[..., None, :])).sum(axis=(-2, -1))

    angle = _major_angle(var_row, var_col, covariance)
    # An eigenvalue does not change to first order with its direction, so the gradient with the
    # direction held fixed is exact; it is finite where both are equal too.
    cosine, sine = lax.stop_gradient((jnp.cos(angle), jnp.sin(angle)))
    major = cosine**2 * var_col + 2 * cosine * sine * covariance + sine**2 * var_row
    across = cosine[..., None, None] * row[..., None] - sine[..., None, None] * col[..., None, :]
    minor = (grid * across**2).sum(axis=(-2, -1))
    major = jnp.maximum(major, minor)  # they can be a rounding apart in a round field
    thin = minor / jnp.where(major > _POINT, major, 1.0)
    eccentricity = jnp.where(major > _POINT, _root(1 - thin), 0.0)

    some = weights > 0
    # The choice around the product keeps YNNPACK from the logarithms (docs/performance.md).
    terms = jnp.where(some, weights * jnp.log(jnp.where(some, weights, 1.0)), 0.0)
    entropy = -terms.sum(axis=-1) / max(math.log(layout.num_patches), 1e-6)
    fields = ResponsiveField(
        tendency=jnp.stack([mean_row, mean_col], axis=-1),
        spread=_root(mean_row**2 + mean_col**2 + var_row + var_col),
        axes=jnp.stack([_root(major), _root(minor)], axis=-1),
        angle=angle,
        eccentricity=eccentricity,
        entropy=entropy,
    )
    return ResponsiveField(
        *(
            jnp.where(usable[..., None] if field.ndim > usable.ndim else usable, field, jnp.nan)
            for field in fields
        )
    )


def _major_angle(
    var_row: Float[Array, "*batch"],
    var_col: Float[Array, "*batch"],
    covariance: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """Angle of the major axis from +column towards +row, in (-pi/2, pi/2]; 0 in a round field."""
    # The angle does not depend on the scale, so that is held fixed: squares do not underflow.
    trace = lax.stop_gradient(var_row + var_col)
    scale = 1 / jnp.where(trace > _POINT, trace, 1.0)
    along, oblique = (var_col - var_row) * scale, 2 * covariance * scale
    # Differences within the rounding have no direction, and would have no finite gradient.
    lengthy = (trace > _POINT) & (jnp.abs(along) + jnp.abs(oblique) > 1e-6)
    angle = 0.5 * jnp.arctan2(jnp.where(lengthy, oblique, 0.0), jnp.where(lengthy, along, 1.0))
    half_turn = np.float32(np.pi / 2)
    return jnp.where(angle <= -half_turn, half_turn, angle)


def _root(square: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Square root with gradient 0 instead of infinity at 0; 0 for negative rounding residues."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
