"""Attention whose weights nobody asks for."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vit_interact.models import attend
from vit_interact.models.attend import QueryBlocks, attend_in_blocks, explicit_attention
from vit_interact.models.bias import SeparableBias

FUSED_ROWS = 4096
"""Rows of all heads and images from which XLA's CPU compiler makes one loop of both products of
attention and the softmax between them, whose weights stay in the cache."""


def fused_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    mask: Bool[Array, ...] | None = None,
    bias: SeparableBias | None = None,
) -> Float[Array, "*B N H K"]:
    """The output by the fastest way of the device, for arrays as `explicit_attention` takes them.

    On a CPU, `jax.nn.dot_product_attention` is slower than products and softmax written out, and
    makes all weights at once.
    """
    if bias is not None:
        return plain_attention(query, key, value, mask, bias)
    given = () if mask is None else (mask,)
    return lax.platform_dependent(
        query, key, value, *given, cpu=plain_attention, default=_dot_product_attention
    )


def plain_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    mask: Bool[Array, ...] | None = None,
    bias: SeparableBias | None = None,
) -> Float[Array, "*B N H K"]:
    """The same output by products and softmax, in blocks of queries where there are many tokens."""
    *batch, queries, heads, _ = query.shape
    blocks = attend.suitable_blocks(math.prod(batch), heads, queries, key.shape[-3])
    if blocks is None:
        full = None if bias is None else bias.full(key.shape[-3])
        return explicit_attention(query, key, value, full, mask, scale_output=True).output
    if mask is None and bias is None:
        return _long_attention(blocks, query, key, value)
    return attend_in_blocks((query, key, value, bias, mask, None), blocks)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _long_attention(blocks: QueryBlocks, query: Array, key: Array, value: Array) -> Array:
    """Attention of many tokens: in blocks that never leave the cache, its derivative in `blocks`.

    A derivative of the larger blocks would hold their weights.
    """
    *batch, tokens, heads, _ = query.shape
    count = min(math.prod(batch) * heads * tokens // FUSED_ROWS, tokens // attend.SMALLEST_BLOCK)
    if count < 2:
        return explicit_attention(query, key, value, scale_output=True).output
    size = -(-tokens // count)
    return attend_in_blocks((query, key, value, None, None, None), QueryBlocks(size))[0]


@_long_attention.defjvp
def _long_attention_jvp(blocks: QueryBlocks, primals: Any, tangents: Any) -> tuple[Array, Array]:
    def in_blocks(*sides: Array) -> Array:
        return attend_in_blocks((*sides, None, None, None), blocks)[0]

    return _long_attention(blocks, *primals), jax.jvp(in_blocks, primals, tangents)[1]


def _dot_product_attention(
    query: Array, key: Array, value: Array, mask: Array | None = None
) -> Array:
    output = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=1.0)
    if mask is not None:
        # jax attends uniformly in a row with every key masked; ours contributes nothing.
        attends = jnp.any(mask, axis=-1)  # [B or 1, H or 1, N or 1]
        output = jnp.where(jnp.swapaxes(attends, -1, -2)[..., None], output, 0)
    return output
