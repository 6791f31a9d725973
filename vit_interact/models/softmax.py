"""Logits and their softmax, of one head or with heads among the leading axes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vit_interact.models.cpu import can_split_images


class Rows(NamedTuple):
    """What a softmax needs to know of each row of logits, float32 or wider.

    A forward pass keeps it for the backward pass, which makes the weights again (Dao et al. 2022).

    Attributes:
      log_sum: logarithm of the sum of exponentials, infinite where every key is masked.
      largest: largest weight.
    """

    log_sum: Array
    largest: Array


ROWS = Rows._fields


def attention_logits(
    query: Float[Array, "*heads M K"],
    key: Float[Array, "*heads N K"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
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
    logits: Float[Array, "*heads M N"], mask: Bool[Array, "..."] | None = None
) -> tuple[Float[Array, "*heads M N"], Rows]:
    """Exponentials of the logits, the largest of a row 1, and what is known of each row then.

    The softmax over keys is the exponentials times the row's largest weight; a row with every key
    masked is 0 instead of uniform or NaN.
    """
    exponentials, highest = exponentials_of(logits, mask)
    return exponentials, softmax_rows(highest, jnp.sum(exponentials, axis=-1, keepdims=True), mask)


def exponentials_of(
    logits: Float[Array, "*heads M N"], mask: Bool[Array, "..."] | None = None
) -> tuple[Float[Array, "*heads M N"], Float[Array, "*heads M 1"]]:
    """Exponentials of the logits, the largest of a row 1, and the largest logit of each row."""
    highest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - highest)
    if mask is not None:
        # Zeroing masked keys once more matters in rows that mask all of them.
        exponentials = jnp.where(mask, exponentials, 0)
    return exponentials, highest


def softmax_rows(
    highest: Float[Array, "*heads M 1"],
    total: Float[Array, "*heads M 1"],
    mask: Bool[Array, "..."] | None = None,
) -> Rows:
    """Rows of a softmax by their largest logit and the sum of their exponentials."""
    if mask is None:
        return Rows(highest + jnp.log(total), 1 / total)
    attends = total > 0
    total = jnp.where(attends, total, 1)
    log_sum = jnp.where(attends, highest + jnp.log(total), jnp.inf)
    return Rows(log_sum, jnp.where(attends, 1 / total, 0))


def softmax_of(
    logits: Float[Array, "*heads M N"],
    mask: Bool[Array, "..."] | None = None,
    rows: Rows | None = None,
) -> tuple[Float[Array, "*heads M N"], Rows]:
    """The softmax over keys and its rows, which save two passes over the logits where known."""
    if rows is None:
        exponentials, rows = softmax_parts(logits, mask)
        return exponentials * rows.largest, rows
    return jnp.exp(logits - rows.log_sum), rows


def without_batch(*arrays: Array | None) -> list[Any]:
    """Without leading axes before the last three, all of size 1; see `by_head.is_single`."""
    return [None if array is None else array.reshape(array.shape[-3:]) for array in arrays]


def heads_first(array: Float[Array, "*B N H K"]) -> Float[Array, "*B H N K"]:
    """Heads before tokens."""
    return jnp.swapaxes(array, -3, -2)


class HeadsJoined(NamedTuple):
    """Heads and images in one axis, as XLA's CPU multiplies them faster, or heads before tokens.

    The reshape keeps it from multiplying strided matrices in place of the transposed ones, which
    are contiguous (docs/performance.md).

    Attributes:
      lead: axes of images and heads, joined; None where they stay as they are.
    """

    lead: tuple[int, ...] | None

    @classmethod
    def of(cls, query: Float[Array, "*B N H K"], bias: Any, mask: Any) -> HeadsJoined:
        """Not where arrays are broadcast to all heads, or lie on many devices."""
        joined = bias is None and mask is None and query.ndim > 3 and can_split_images()
        return cls((*query.shape[:-3], query.shape[-2]) if joined else None)

    def taken(self, array: Float[Array, "*B N H K"]) -> Float[Array, "*heads N K"]:
        """An array of the layer, as products want it."""
        array = heads_first(array)
        return array if self.lead is None else array.reshape(-1, *array.shape[-2:])

    def given(self, array: Float[Array, "*heads N _"]) -> Float[Array, "*B H N _"]:
        """What was made of such."""
        return array if self.lead is None else array.reshape(*self.lead, *array.shape[-2:])
