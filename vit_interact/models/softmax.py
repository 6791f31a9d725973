"""Logits and their softmax, of one head or with heads among the leading axes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def attention_logits(
    query: Float[Array, "*heads M K"],
    key: Float[Array, "*heads N K"],
    bias: Float[Array, ...] | None = None,
    mask: Bool[Array, ...] | None = None,
) -> Float[Array, "*heads M N"]:
    """`query · key` plus bias, masked entries at the type's lowest number; float32 or wider.

    Heads stand before tokens: left to einsum, XLA's CPU multiplies strided matrices, and attention
    takes twice as long.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("...ik,...jk->...ij", query, key, preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    return logits


def softmax_parts(
    logits: Float[Array, "*heads M N"], mask: Bool[Array, ...] | None = None
) -> tuple[Float[Array, "*heads M N"], Float[Array, "*heads M 1"]]:
    """Exponentials of the logits, the largest of a row 1, and what each row is to be multiplied by.

    Their product is the softmax over keys; a row with every key masked is 0 instead of uniform or
    NaN.
    """
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - largest)
    if mask is None:
        return exponentials, 1 / jnp.sum(exponentials, axis=-1, keepdims=True)
    # Zeroing masked keys once more matters in rows that mask all of them.
    exponentials = jnp.where(mask, exponentials, 0)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials, jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def without_batch(*arrays: Array | None) -> list[Any]:
    """Without leading axes before the last three, all of size 1; see `by_head.is_single`."""
    return [None if array is None else array.reshape(array.shape[-3:]) for array in arrays]


def heads_first(array: Float[Array, "*B N H K"]) -> Float[Array, "*B H N K"]:
    """Heads before tokens."""
    return jnp.swapaxes(array, -3, -2)
