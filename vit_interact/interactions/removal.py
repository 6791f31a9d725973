"""Indiscriminative patches: how much each patch affects the others, and which matter least."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from vit_interact.layout import TokenLayout


def received_impact(
    indicator: Float[Array, "*batch N N"] | Float[np.ndarray, "*batch N N"],
    layout: TokenLayout,
    include_prefix: bool = True,
) -> Float[Array, "*batch P"]:
    """How much each patch affects all other tokens: `c_j = sum over i != j of I_ij`.

    Args:
      indicator: token-to-token indicator `[..., N, N]`, query first, any unit.
      layout: the order of the tokens.
      include_prefix: whether prefix tokens count among the tokens `i` that are affected.

    Returns:
      `[..., P]` float32, in the unit of the indicator.

    Raises:
      ValueError: if the shape is not the layout's.
    """
    layout.check_tokens(np.shape(indicator), "indicator")
    first = 0 if include_prefix else layout.prefix
    queries = np.arange(first, layout.num_tokens, dtype=np.int32)
    return impact_of_rows(jnp.asarray(indicator)[..., first:, :], queries, layout)


def impact_of_rows(
    rows: Float[Array, "*batch M N"],
    queries: Int32[Array, " M"] | Int32[np.ndarray, " M"],
    layout: TokenLayout,
) -> Float[Array, "*batch P"]:
    """What some tokens alone add to the received impact.

    Args:
      rows: rows of an indicator `[..., M, N]`, any unit.
      queries: which tokens they are of, `[M]`.
      layout: the order of the tokens.

    Returns:
      `[..., P]` float32; the sum over all tokens is `received_impact`.
    """
    impact = jnp.asarray(rows, jnp.float32)[..., layout.prefix :]
    keys = np.arange(layout.prefix, layout.num_tokens, dtype=np.int32)
    # Left out by a choice and not by a subtraction: a large I_jj must not swallow the rest.
    return jnp.where(jnp.asarray(queries)[:, None] != keys, impact, 0.0).sum(axis=-2)


def removal_order(
    impact: Float[Array, "*batch P"] | Float[np.ndarray, "*batch P"],
) -> Int32[Array, "*batch P"]:
    """The order in which patches are removed: least received impact first.

    Args:
      impact: received impact `[..., P]`, from `received_impact`.

    Returns:
      Patch numbers `[..., P]`; of equal impacts the lower number comes first, NaN comes last.
    """
    return jnp.argsort(jnp.asarray(impact), axis=-1, stable=True).astype(jnp.int32)
