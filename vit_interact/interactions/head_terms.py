"""What one head adds to an indicator, and the closed form of cutting an edge.

Most indicators are sums over heads of something that a head gives alone (`TERMS`). So the weights
of one head are enough at a time: attention that makes them head by head (`models/attend_heads.py`)
never holds those of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EXACT = jax.lax.Precision.HIGHEST

# What rounding adds to the squared length of `o − v` grows by 1/(1−A)², 11 here.
DOMINANT = 0.7


class Head(NamedTuple):
    """One head of a layer, or a few along the first axis; float32 or wider but for the kernel.

    The weights may be in two parts, so that XLA makes them where they are read.

    Attributes:
      exponentials: of the logits `[..., M, N]`, the largest of a row 1; or the weights themselves.
      share: what makes weights of a row of them, `[..., M, 1]`; None where they are weights.
      largest: largest weight of a row, `[..., M, 1]`.
      values: `[..., N, K]`.
      output: `[..., M, K]`.
      out_kernel: `[..., K, D]`, or None.
      logit_grad: derivative of the score by the logits `[..., M, N]`; None without a backward pass.
      along: `g · o` of each query `[..., M, 1]`; None without a backward pass.
    """

    exponentials: Array
    share: Array | None
    largest: Array
    values: Array
    output: Array
    out_kernel: Array | None = None
    logit_grad: Array | None = None
    along: Array | None = None

    @property
    def weights(self) -> Float[Array, "*heads M N"]:
        """Rows sum to 1."""
        return self.exponentials if self.share is None else self.exponentials * self.share


class Term(NamedTuple):
    """An indicator as a sum over heads.

    Attributes:
      of: what is added, `[..., M, N]`.
      finish: makes the indicator of the sum and the number of heads.
    """

    of: Callable[[Head], Array]
    finish: Callable[[Array, int], Array]


def leave_one_out_squared(
    weights: Array, dominant: Array, v: Array, o: Array, metric: Array
) -> Float[Array, "*heads M N"]:
    """Squared change of the update when an edge of one head is cut.

    `‖(o_i − v_j)W‖²` is expanded, so that no `[..., M, N, K]` exists, and all of it is one product:
    XLA's CPU is slow where sums over channels meet as rows and columns.

    Args:
      weights: `[..., M, N]`.
      dominant: `leave_one_out_dominant`, `[..., M, 1]`.
      v: values, less their mean over tokens, `[..., N, K]`: differences stay, big terms shrink.
      o: the output, less the same, `[..., M, K]`.
      metric: `W Wᵀ`, `[..., K, K]`.
    """
    _, own_value = _metric_products(v, metric)
    keys = jnp.concatenate([v, jnp.ones_like(own_value), own_value], axis=-1)
    o_m, own_output = _metric_products(o, metric)
    queries = jnp.concatenate([-2 * o_m, own_output, jnp.ones_like(own_output)], axis=-1)
    distance = jnp.einsum("...ik,...jk->...ij", queries, keys, precision=EXACT)
    dominates, rest = split_dominant(weights)
    factor = rest / (1 - rest)
    return jnp.where(dominates, dominant, jnp.square(factor) * jax.nn.relu(distance))


def leave_one_out_dominant(
    weights: Array, v: Array, o: Array, metric: Array
) -> Float[Array, "*heads M 1"]:
    """`leave_one_out_squared` for the key that dominates a row; without one, of no use."""
    _, rest = split_dominant(weights)
    kept = jnp.einsum("...ij,...jk->...ik", rest, v, precision=EXACT)
    change = cut_dominant(kept, jnp.sum(rest, axis=-1, keepdims=True), o)
    return jax.nn.relu(_metric_products(change, metric)[1])


def metric_of(out_kernel: Float[Array, "*heads K D"]) -> Float[Array, "*heads K K"]:
    """`W Wᵀ`: what lengths in the residual stream are to a head's channels."""
    return jnp.einsum("...kd,...ld->...kl", out_kernel, out_kernel, precision=EXACT)


def _metric_products(x: Array, metric: Array) -> tuple[Array, Array]:
    """`x M` and `x · x M` of vectors `[..., N, K]`."""
    moved = jnp.einsum("...ik,...kl->...il", x, metric, precision=EXACT)
    return moved, jnp.sum(moved * x, axis=-1, keepdims=True)


def split_dominant(weights: Array) -> tuple[Array, Array]:
    """Where a key dominates, at most once in a row, and the weights without it.

    With `A → 1`, `A/(1−A) · (o − v)` is a huge number times a difference that rounding ate: what
    cutting such a key does comes from the other keys.
    """
    dominates = weights > DOMINANT
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


def safe_sqrt(squared: Array) -> Array:
    """Square root with gradient 0 at 0, where the true one is infinite; NaN stays NaN."""
    none = squared <= 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, squared)))


def if_dominated(
    found: Array, function: Callable[..., Array], none: Array, *operands: Array
) -> Array:
    """What a function gives for rows that a key dominates; `none` on a CPU where none is `found`.

    The function multiplies matrices, which few heads need. Arrays that it makes for itself are not
    made without it; those that it is given by the branch would be copied.
    """
    # On an accelerator a branch would wait for the host.
    if jax.default_backend() != "cpu":
        return function(*operands)
    return jax.lax.cond(found, function, lambda *_: none, *operands)


def _if_dominated(head: Head, function: Callable[[Array], Array]) -> Array:
    none = jax.lax.stop_gradient(jnp.minimum(head.largest, 0))
    found = jnp.max(head.largest) > DOMINANT
    return if_dominated(found, lambda: function(head.weights), none)


def _leave_one_out(head: Head) -> Array:
    assert head.out_kernel is not None
    metric = metric_of(head.out_kernel.astype(head.largest.dtype))
    mean = jnp.mean(head.values, axis=-2, keepdims=True)
    sides = head.values - mean, head.output - mean, metric
    dominant = _if_dominated(head, lambda weights: leave_one_out_dominant(weights, *sides))
    return leave_one_out_squared(head.weights, dominant, *sides)


def _gradient(head: Head) -> Array:
    assert head.logit_grad is not None and head.along is not None
    return jax.nn.relu(head.logit_grad + head.weights * head.along)


def _edge(head: Head) -> Array:
    logit_grad = head.logit_grad
    assert logit_grad is not None
    dominant = _if_dominated(head, lambda weights: cut_dominant_by_logits(weights, logit_grad))
    return cut_by_logits(head.weights, logit_grad, dominant)


def _mean(total: Array, heads: int) -> Array:
    return total / heads


TERMS: dict[str, Term] = {
    "attention": Term(lambda head: head.weights, _mean),
    "rollout": Term(lambda head: head.weights, _mean),
    "gradient": Term(_gradient, _mean),
    "leave_one_out": Term(_leave_one_out, lambda total, heads: safe_sqrt(total)),
    "edge": Term(_edge, lambda total, heads: jnp.abs(total)),
}
"""Of indicators that are sums over heads; a rollout adds up what its layers attend to."""
