"""What indicators share: sums over heads, and the closed form of cutting an edge."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EXACT = jax.lax.Precision.HIGHEST

# Weights of a layer up to which all heads are worked on together: smaller pieces leave threads
# idle, larger ones do not stay in the cache. One image of ViT-S at 224 pixels is below.
_AT_ONCE = 2**18


def split_dominant(weights: Array) -> tuple[Array, Array]:
    """Where a key has `A > ½`, at most once in a row, and the weights without it.

    With `A → 1`, `A/(1−A) · (o − v)` is a huge number times a difference that rounding ate: what
    cutting such a key does comes from the other keys.
    """
    dominates = weights > 0.5
    return dominates, jnp.where(dominates, 0, weights)


def cut_dominant(rest_output: Array, rest_sum: Array, output: Array) -> Array:
    """Change of a head's output where the key that dominates a row is cut, `[..., M, K]`.

    `A (o_rest − v)`, where `o_rest` is the output of the other keys alone.

    Args:
      rest_output: what the other keys contribute, `[..., M, K]`.
      rest_sum: their weight, `[..., M, 1]`; 0 gives no change.
      output: of all keys, `[..., M, K]`.
    """
    others = rest_sum > 0
    alone = _divide(rest_output, jnp.where(others, rest_sum, 1))
    return jnp.where(others, (1 - rest_sum) * alone - (output - rest_output), 0)


def cut_by_logits(weights: Array, logit_grad: Array) -> Array:
    """Effect on the score, to first order, of cutting each edge of one head.

    Cutting `j` changes the score by `A/(1−A) g_i·(o_i − v_j)`, and `∂s/∂z_ij = A g_i·(v_j − o_i)`:
    it is `−∂s/∂z_ij / (1−A)`. For the one key of a row that may have `A > ½` this is a small number
    over a smaller one; there the effect comes from the other keys, which the query would turn to.

    Args:
      weights: `[..., M, N]`.
      logit_grad: derivative of the score by the logits `z`, `[..., M, N]`.
    """
    dominates, rest = split_dominant(weights)
    rest_sum = jnp.sum(rest, axis=-1, keepdims=True)
    rest_grad = jnp.sum(jnp.where(dominates, 0, logit_grad), axis=-1, keepdims=True)
    others = rest_sum > 0
    alone = jnp.where(others, _divide(rest_grad, jnp.where(others, rest_sum, 1)), 0)
    dominant = jnp.where(others, weights * alone - logit_grad, 0)
    return jnp.where(dominates, dominant, -logit_grad / (1 - rest))


@jax.custom_jvp
def _divide(numerator: Array, denominator: Array) -> Array:
    """A quotient whose derivative survives a tiny denominator, which jax's own would square."""
    return numerator / denominator


@_divide.defjvp
def _divide_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (numerator, denominator), (by_numerator, by_denominator) = primals, tangents
    quotient = _divide(numerator, denominator)
    return quotient, (by_numerator - quotient * by_denominator) / denominator


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
    of_head: Callable[..., Array], weights: Array, *sides: tuple[Array, int], alone: bool = False
) -> Array:
    """Adds up what a function gives for each head.

    Args:
      of_head: of a head's weights `[..., M, N]` and its part of each side.
      weights: `[..., H, M, N]`.
      sides: each with its axis of heads, counted from the end.
      alone: one head at a time, even where all together are small.
    """
    inputs = ((weights, -3), *sides)
    if not alone and weights.size <= _AT_ONCE:
        # Heads to the front: XLA's CPU is slow in multiplying strided matrices.
        each = jax.vmap(of_head)(*(jnp.moveaxis(array, axis, 0) for array, axis in inputs))
        return functools.reduce(jnp.add, each)

    def add_head(head: Array, total: Array) -> Array:
        return total + of_head(*(_pick(array, head, axis) for array, axis in inputs))

    # Zeros that depend on the weights: constant zeros would be one buffer that XLA copies for every
    # layer of a model ahead of time (measured: +70 % temporary memory at 12 layers), and would not
    # vary over a mesh as the loop's result does under shard_map.
    zeros = jax.lax.stop_gradient(jnp.minimum(weights[..., 0, :, :], 0))
    return jax.lax.fori_loop(0, weights.shape[-3], add_head, zeros)


def _pick(array: Array, head: Array, axis: int) -> Array:
    return jax.lax.dynamic_index_in_dim(array, head, axis % array.ndim, keepdims=False)
