"""Indicators seen between patches, row by row and across layers."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.layout import TokenLayout


def patch_view(
    indicator: Float[Array, "*batch N N"], layout: TokenLayout, rows: bool = True
) -> Float[Array, "*batch P P"]:
    """The impact of patches on patches, without prefix tokens.

    Args:
      indicator: `[..., N, N]`.
      layout: which token is which patch.
      rows: divide each row by its sum; a row of zeros stays zero.

    Raises:
      ValueError: when the indicator does not fit the layout.
    """
    layout.check_tokens(indicator.shape, "indicator")
    view = widen(indicator)[..., layout.prefix :, layout.prefix :]
    return normalise_rows(view) if rows else view


def combine_layers(
    indicator: Float[Array, "L *batch N N"], layout: TokenLayout
) -> Float[Array, "*batch N N"]:
    """Mean over layers, each first divided by its own patch-to-patch mean for that image.

    Without the division one layer would drown the rest. A layer whose patch-to-patch view is all
    zeros (the last one of `edge` and `gradient` with a class-token head) is left out.

    Args:
      indicator: `[L, ..., N, N]`.
      layout: which token is which patch.

    Returns:
      `[..., N, N]`; patch-to-patch entries have mean 1.
    """
    layout.check_tokens(indicator.shape, "indicator")
    indicator = widen(indicator)
    scale = jnp.mean(patch_view(indicator, layout, rows=False), axis=(-2, -1), keepdims=True)
    counted = scale > 0
    scaled = jnp.where(counted, indicator / jnp.where(counted, scale, 1), 0)
    # One by one: over a leading axis XLA's CPU compiler lets YNNPACK jump from layer to layer.
    total = functools.reduce(jnp.add, scaled)
    return total / jnp.maximum(jnp.sum(counted, axis=0), 1)


def normalise_rows(matrix: Float[Array, "*batch N M"]) -> Float[Array, "*batch N M"]:
    """Each row divided by its sum; a row of zeros stays zero."""
    total = jnp.sum(matrix, axis=-1, keepdims=True)
    return jnp.where(total > 0, matrix / jnp.where(total > 0, total, 1), 0)


def widen(array: Array | np.ndarray) -> Array:
    """float32, or float64 when it already is."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
