"""Attention whose weights nobody asks for."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vit_interact.models.attend import (
    QueryBlocks,
    attend_in_blocks,
    explicit_attention,
    suitable_blocks,
)
from vit_interact.models.bias import SeparableBias


def fused_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    mask: Bool[Array, ...] | None = None,
    bias: SeparableBias | None = None,
    blocks: QueryBlocks | None = None,
) -> Float[Array, "*B N H K"]:
    """The output by the fastest way of the device, for arrays as `explicit_attention` takes them.

    On a CPU, `jax.nn.dot_product_attention` is slower than products and softmax written out, and
    makes all weights at once. Those are written out in `blocks`, of `suitable_blocks` by default.
    """
    plain = functools.partial(_plain_attention, blocks=blocks)
    if bias is not None:
        return plain(query, key, value, mask, bias)
    given = () if mask is None else (mask,)
    return lax.platform_dependent(
        query, key, value, *given, cpu=plain, default=_dot_product_attention
    )


def _plain_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    bias: SeparableBias | None = None,
    *,
    blocks: QueryBlocks | None,
) -> Array:
    """The same output by products and softmax, in blocks where there are many tokens."""
    *batch, queries, heads, _ = query.shape
    blocks = blocks or suitable_blocks(math.prod(batch), heads, queries, key.shape[-3])
    if blocks is None:
        full = None if bias is None else bias.full(key.shape[-3])
        return explicit_attention(query, key, value, full, mask, scale_output=True).output
    return attend_in_blocks((query, key, value, bias, mask, None), blocks)[0]


def _dot_product_attention(
    query: Array, key: Array, value: Array, mask: Array | None = None
) -> Array:
    output = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=1.0)
    if mask is not None:
        # jax attends uniformly in a row with every key masked; ours contributes nothing.
        attends = jnp.any(mask, axis=-1)  # [B or 1, H or 1, N or 1]
        output = jnp.where(jnp.swapaxes(attends, -1, -2)[..., None], output, 0)
    return output
