"""Sums over the heads of whole layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.interactions.head_terms import DOMINANT, if_dominated

# Weights of a layer up to which all heads are worked on together: smaller pieces leave threads
# idle, larger ones do not stay in the cache. One image of ViT-S at 224 pixels is below.
_AT_ONCE = 2**18


def add_heads(per_head: Array) -> Array:
    """Sum over heads of `[..., H, M, N]`."""
    # One head after the other, not `jnp.sum`: XLA's CPU kernel for a reduction of an axis this far
    # out is slower than the softmax (measured: 10 ms against 0.6 ms of a layer at 1,370 tokens).
    return functools.reduce(jnp.add, jnp.moveaxis(per_head, -3, 0))


def mean_over_heads(per_head: Array) -> Array:
    """Mean over heads of `[..., H, M, N]`."""
    return add_heads(per_head) / per_head.shape[-3]


def is_single(batch: tuple[int, ...]) -> bool:
    """Whether leading axes are there, and hold one element.

    XLA's CPU takes ten times as long for sums of products with an axis of one image as without.
    """
    return bool(batch) and math.prod(batch) == 1


def of_one(
    function: Callable[..., Array], *arrays: Array | np.ndarray
) -> Float[Array, "*batch M N"]:
    """A map of arrays with three axes each after those of a batch of one: made without these."""
    batch = arrays[0].shape[:-3]
    found = function(*(jnp.reshape(array, array.shape[-3:]) for array in arrays))
    return found.reshape(*batch, *found.shape)


def sum_over_heads(
    of_head: Callable[..., Array], weights: Array, *sides: tuple[Array, int]
) -> Array:
    """Adds up what a function gives for each head.

    Args:
      of_head: of a head's weights `[..., M, N]` and its part of each side.
      weights: `[..., H, M, N]`.
      sides: each with its axis of heads, counted from the end.
    """
    inputs = ((weights, -3), *sides)
    if weights.size <= _AT_ONCE:
        # Heads to the front: XLA's CPU is slow in multiplying strided matrices.
        each = jax.vmap(of_head)(*(jnp.moveaxis(array, axis, 0) for array, axis in inputs))
        return functools.reduce(jnp.add, each)

    def add_head(head: Array, total: Array) -> Array:
        return total + of_head(*(_pick(array, head, axis) for array, axis in inputs))

    return jax.lax.fori_loop(0, weights.shape[-3], add_head, _zeros(weights))


def where_dominated(
    function: Callable[..., Array], weights: Array, *sides: tuple[Array, int]
) -> Float[Array, "*batch H M 1"]:
    """A number for each row of each head, of use only where a key dominates the row.

    On a CPU it is 0 for heads without such a row: the function, which multiplies matrices, is left
    out.

    Args:
      function: of a head's weights `[..., M, N]` and its part of each side; gives `[..., M, 1]`.
      weights: `[..., H, M, N]`.
      sides: as for `sum_over_heads`.
    """
    inputs = ((weights, -3), *sides)

    def of_head(head: Array) -> Array:
        return function(*(_pick(array, head, axis) for array, axis in inputs))

    def of_head_if(head: Array) -> Array:
        # Arrays are picked from within the branch: to it, they would be copied.
        return if_dominated(found[head], of_head, none, head)

    none = _zeros(weights[..., :1])
    others = tuple(axis for axis in range(weights.ndim) if axis != weights.ndim - 3)
    found = jnp.max(weights, axis=others) > DOMINANT
    each = jax.lax.map(of_head_if, jnp.arange(weights.shape[-3]))
    return jnp.moveaxis(each, 0, -3)


def _zeros(weights: Array) -> Array:
    """Zeros `[..., M, N]` that depend on the weights `[..., H, M, N]`.

    Constant zeros would be one buffer that XLA copies for every layer of a model ahead of time
    (measured: +70 % temporary memory at 12 layers), and would not vary over a mesh as a loop's
    result does under shard_map.
    """
    return jax.lax.stop_gradient(jnp.minimum(weights[..., 0, :, :], 0))


def _pick(array: Array, head: Array, axis: int) -> Array:
    return jax.lax.dynamic_index_in_dim(array, head, axis % array.ndim, keepdims=False)
