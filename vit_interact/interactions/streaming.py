"""Received impact, windows and responsive fields straight from rows of an indicator.

Windows and fields of a query need its row only, and received impact is a sum over rows. So blocks
of queries are enough, and the whole map `[P, P]` need not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from vit_interact.interactions.fields import ResponsiveField, fields_of_rows, responsive_field
from vit_interact.interactions.removal import received_impact
from vit_interact.interactions.views import patch_view
from vit_interact.interactions.windows import smallest_windows, windows_of_columns
from vit_interact.layout import TokenLayout


class Fields(NamedTuple):
    """What an indicator says about each patch, without the map itself.

    Attributes:
      received_impact: `[..., P]`, in the unit of the indicator.
      windows: (top, left, bottom, right) in patches `[..., P, 4]`; `[Q, ..., P, 4]` for several
        coverages.
      field: moments, axes and entropy of the rows.
    """

    received_impact: Float[Array, "*batch P"]
    windows: Int32[Array, "*windows P 4"]
    field: ResponsiveField


def fields_of_map(
    indicator: Float[Array, "*batch N N"],
    layout: TokenLayout,
    coverage: float | Sequence[float] = 0.9,
) -> Fields:
    """All three from a whole map.

    Args:
      indicator: token-to-token indicator `[..., N, N]`.
      layout: the order of the tokens.
      coverage: as for `smallest_windows`.
    """
    view = patch_view(indicator, layout, rows=False)
    return Fields(
        received_impact(indicator, layout),
        smallest_windows(view, layout, coverage),
        responsive_field(view, layout),
    )


def fields_of_columns(
    rows: Float[Array, "*batch M N"],
    queries: Int32[Array, " M"] | Int32[np.ndarray, " M"],
    layout: TokenLayout,
    coverages: Sequence[float],
) -> tuple[Int32[Array, "*batch M Q 4"], ResponsiveField]:
    """Windows and fields of the patches of whole columns of the grid.

    Args:
      rows: their rows of a token-to-token indicator, column by column, `M` a multiple of `R`.
      queries: which tokens they are.
      layout: the order of the tokens.
      coverages: shares of a row in (0, 1].

    Returns:
      Windows `[..., M, Q, 4]`, and fields `[..., M]`.
    """
    rows = jnp.asarray(rows, jnp.float32)[..., layout.prefix :]
    patch = jnp.asarray(queries) - layout.prefix
    columns = rows.reshape(*rows.shape[:-2], -1, layout.rows, layout.num_patches)
    cols = patch.reshape(-1, layout.rows)[:, 0] % layout.cols
    windows = windows_of_columns(columns, cols, layout, coverages)
    position = jnp.stack([patch // layout.cols, patch % layout.cols], axis=-1)
    field = fields_of_rows(rows, position, layout)
    return windows.reshape(*rows.shape[:-1], len(coverages), 4), field
