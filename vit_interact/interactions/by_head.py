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

# What rounding adds to the squared length of `o − v` grows by 1/(1−A)², 11 here.
_DOMINANT = 0.7


def split_dominant(weights: Array) -> tuple[Array, Array]:
    """Where a key dominates, at most once in a row, and the weights without it.

    With `A → 1`, `A/(1−A) · (o − v)` is a huge number times a difference that rounding ate: what
    cutting such a key does comes from the other keys.
    """
    dominates = weights > _DOMINANT
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


def cut_by_logits(weights: Array, logit_grad: Array, dominant: Array) -> Array:
    """Effect on the score, to first order, of cutting each edge of one head.

    Cutting `j` changes the score by `A/(1−A) g_i·(o_i − v_j)`, and `∂s/∂z_ij = A g_i·(v_j − o_i)`:
    it is `−∂s/∂z_ij / (1−A)`.

    Args:
      weights: `[..., M, N]`.
      logit_grad: derivative of the score by the logits `z`, `[..., M, N]`.
      dominant: `cut_dominant_by_logits`, `[..., M, 1]`.
    """
    dominates, rest = split_dominant(weights)
    return jnp.where(dominates, dominant, -logit_grad / (1 - rest))


def cut_dominant_by_logits(weights: Array, logit_grad: Array) -> Array:
    """`cut_by_logits` for the key that dominates a row, `[..., M, 1]`; without one, of no use.

    There it would be a small number over a smaller one. So it comes from the other keys, which the
    query would turn to.
    """
    dominates, rest = split_dominant(weights)

    def total(of: Array) -> Array:
        return jnp.sum(of, axis=-1, keepdims=True)

    rest_sum, rest_grad = total(rest), total(jnp.where(dominates, 0, logit_grad))
    own, own_grad = total(weights - rest), total(jnp.where(dominates, logit_grad, 0))
    others = rest_sum > 0
    alone = _divide(rest_grad, jnp.where(others, rest_sum, 1))
    return jnp.where(others, own * alone - own_grad, 0)


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
        return jax.lax.cond(found[head], of_head, lambda _: none, head)

    none = _zeros(weights[..., :1])
    heads = jnp.arange(weights.shape[-3])
    others = tuple(axis for axis in range(weights.ndim) if axis != weights.ndim - 3)
    found = jnp.max(weights, axis=others) > _DOMINANT
    # On an accelerator a branch would wait for the host.
    branches = jax.default_backend() == "cpu"
    each = jax.lax.map(of_head_if if branches else of_head, heads)
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
