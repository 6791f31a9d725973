"""Indicators: the impact of token `j` on token `i` in one attention layer, as pure functions.

Definitions and sources are in docs/method.md. All functions take any leading axes, accept bf16,
compute in float32 (or float64 when the weights are), and work under `jit`, `vmap`, `grad` and
sharding. Axes: `H` heads, `M` queries, `N` tokens, `K` width of a head, `D` width of the model.

Rows do not depend on one another: `M` is `N` for all queries of a layer, or fewer for a block of
them. So the functions that take whole layers also are the ones that blockwise attention calls.

Heads are visited one after the other: what exists at a time is `[..., M, N]`, never
`[..., H, M, N]` beyond the weights that came in, and never `[..., M, N, K]`. Those that visit heads
are jitted: the layers of a model share one trace of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.interactions.views import normalise_rows, widen

_EXACT = jax.lax.Precision.HIGHEST

Weights = Float[Array, "*batch H M N"] | Float[np.ndarray, "*batch H M N"]
Heads = Float[Array, "*batch N H K"] | Float[np.ndarray, "*batch N H K"]
Gradients = Float[Array, "*batch M H K"] | Float[np.ndarray, "*batch M H K"]
Kernel = Float[Array, "H K D"] | Float[np.ndarray, "H K D"]


class Captures(NamedTuple):
    """Raw tensors of a model's attention layers; the leading axis is the layer.

    Attributes:
      weights: `[L, B, H, N, N]`.
      values: `[L, B, N, H, K]`.
      output: `[L, B, N, H, K]`, one output for each head.
      output_grad: `[L, B, N, H, K]`, derivative of the score with respect to `output`.
      out_kernel: `[L, H, K, D]`, multiplied by LayerScale where the model has it.
    """

    weights: Array | None = None
    values: Array | None = None
    output: Array | None = None
    output_grad: Array | None = None
    out_kernel: Array | None = None


def attention(weights: Weights) -> Float[Array, "*batch M N"]:
    """Mean over heads of the attention weights.

    Args:
      weights: attention weights `[..., H, M, N]`, rows sum to 1.

    Returns:
      `[..., M, N]`, a share of attention (no unit).
    """
    return _mean_over_heads(widen(weights))


def dispersion(weights: Weights) -> Float[Array, "*batch M N"]:
    """Population standard deviation over heads of the attention weights.

    Variance over heads as a sign of importance follows Igaue & Aizawa (2025).

    Args:
      weights: attention weights `[..., H, M, N]`.

    Returns:
      `[..., M, N]`, a share of attention (no unit).
    """
    weights = widen(weights)
    mean = _mean_over_heads(weights)[..., None, :, :]
    return _safe_sqrt(_mean_over_heads(jnp.square(weights - mean)))


@jax.jit
def value_norm(weights: Weights, values: Heads, out_kernel: Kernel) -> Float[Array, "*batch M N"]:
    """Length of what `j` adds to the attention update of `i`, exact across heads.

    `‖ sum_h A_ij^h v_j^h W_h ‖`, after Kobayashi et al. (2020). The square is a quadratic form of
    the `H` weights of an edge in the Gram matrix of the transformed values of `j`.

    Args:
      weights: attention weights `[..., H, M, N]`.
      values: `[..., N, H, K]`.
      out_kernel: `[H, K, D]`.

    Returns:
      `[..., M, N]`, in units of the residual stream.
    """
    weights = widen(weights)
    values, kernel = _like(values, weights), _like(out_kernel, weights)
    moved = jnp.einsum("...jhk,hkd->...jhd", values, kernel, precision=_EXACT)
    gram = jnp.einsum("...jhd,...jgd->...hgj", moved, moved, precision=_EXACT)

    def add_head(h: Array, total: Array) -> Array:
        # [..., G, 1, N] against [..., G, M, N]: a fused multiply-and-sum, no transposed copy.
        with_all = _add_heads(_pick(gram, h)[..., None, :] * weights)
        return total + _pick(weights, h) * with_all

    squared = _sum_over_heads(add_head, weights)
    return _safe_sqrt(squared)


@jax.jit
def gradient(weights: Weights, values: Heads, output_grad: Gradients) -> Float[Array, "*batch M N"]:
    """Mean over heads of the positive part of attention times its gradient (Chefer et al. 2021).

    The gradient of the score with respect to a weight is `g_i · v_j`, so no gradient of the weights
    is ever stored.

    Args:
      weights: attention weights `[..., H, M, N]`.
      values: `[..., N, H, K]`.
      output_grad: derivative of the score with respect to each head's output, `[..., M, H, K]`.

    Returns:
      `[..., M, N]`, in units of the score.
    """
    weights = widen(weights)
    values, output_grad = _like(values, weights), _like(output_grad, weights)

    def add_head(h: Array, total: Array) -> Array:
        v, g = _pick(values, h, -2), _pick(output_grad, h, -2)
        slope = jnp.einsum("...ik,...jk->...ij", g, v, precision=_EXACT)
        return total + jax.nn.relu(_pick(weights, h) * slope)

    return _sum_over_heads(add_head, weights) / weights.shape[-3]


@jax.jit
def leave_one_out(
    weights: Weights, values: Heads, out_kernel: Kernel
) -> Float[Array, "*batch M N"]:
    """Size of the change of the attention update of `i` when the edge from `j` is cut.

    `sqrt( sum_h ‖ c_ij^h (o_i^h − v_j^h) W_h ‖² )` with `c = A/(1−A)`: the closed form of masking
    one key and renormalising the softmax, root sum of squares over heads (docs/method.md).

    Args:
      weights: attention weights `[..., H, M, N]`.
      values: `[..., N, H, K]`.
      out_kernel: `[H, K, D]`.

    Returns:
      `[..., M, N]`, in units of the residual stream. 0 where `i` attends to nothing else.
    """
    weights = widen(weights)
    values, kernel = _centred(values, weights), _like(out_kernel, weights)
    metric = jnp.einsum("hkd,hld->hkl", kernel, kernel, precision=_EXACT)  # M_h = W_h W_hᵀ

    def add_head(h: Array, total: Array) -> Array:
        v, m = _pick(values, h, -2), _pick(metric, h)
        cut = _cut_edges(_pick(weights, h), v)
        # ‖(o_i − v_j)W‖² expanded, so that no [.., M, N, K] exists.
        output_m = jnp.einsum("...ik,kl->...il", cut.output, m, precision=_EXACT)
        value_m = jnp.einsum("...jk,kl->...jl", v, m, precision=_EXACT)
        cross = jnp.einsum("...ik,...jk->...ij", output_m, v, precision=_EXACT)
        own_output = jnp.sum(output_m * cut.output, axis=-1)[..., :, None]
        own_value = jnp.sum(value_m * v, axis=-1)[..., None, :]
        distance = jax.nn.relu(own_output - 2 * cross + own_value)
        dominant_m = jnp.einsum("...ik,kl->...il", cut.dominant_change, m, precision=_EXACT)
        dominant = jax.nn.relu(jnp.sum(dominant_m * cut.dominant_change, axis=-1))
        squared = jnp.square(cut.factor) * distance
        return total + jnp.where(cut.dominates, dominant[..., None], squared)

    return _safe_sqrt(_sum_over_heads(add_head, weights))


@functools.partial(jax.jit, static_argnames="signed")
def edge(
    weights: Weights, values: Heads, output_grad: Gradients, signed: bool = False
) -> Float[Array, "*batch M N"]:
    """First-order effect on the score of cutting the edge from `j` to `i`, exact across heads.

    `| sum_h c_ij^h g_i^h · (o_i^h − v_j^h) |` with `c = A/(1−A)` (docs/method.md).

    Args:
      weights: attention weights `[..., H, M, N]`.
      values: `[..., N, H, K]`.
      output_grad: derivative of the score with respect to each head's output, `[..., M, H, K]`.
      signed: return the sum itself: positive where cutting the edge raises the score.

    Returns:
      `[..., M, N]`, in units of the score. 0 where `i` attends to nothing else.
    """
    weights = widen(weights)
    values, output_grad = _centred(values, weights), _like(output_grad, weights)

    def add_head(h: Array, total: Array) -> Array:
        v, g = _pick(values, h, -2), _pick(output_grad, h, -2)
        cut = _cut_edges(_pick(weights, h), v)
        along = jnp.sum(g * cut.output, axis=-1)[..., :, None]
        towards = jnp.einsum("...ik,...jk->...ij", g, v, precision=_EXACT)
        dominant = jnp.sum(g * cut.dominant_change, axis=-1)[..., :, None]
        return total + jnp.where(cut.dominates, dominant, cut.factor * (along - towards))

    total = _sum_over_heads(add_head, weights)
    return total if signed else jnp.abs(total)


def rollout(weights: Float[Array, "L *batch H N N"]) -> Float[Array, "L *batch N N"]:
    """Attention rolled through the layers, with half of each layer on the residual path.

    `M_l M_{l−1} ⋯ M_1` with `M = rownorm(½ mean_h A + ½ I)`, after Abnar & Zuidema (2020).

    Args:
      weights: attention weights of all layers from the first one, `[L, ..., H, N, N]`.

    Returns:
      `[L, ..., N, N]`: the rollout through each layer; the last is the rollout of the model.
    """
    return roll(attention(weights))


def roll(indicator: Float[Array, "L *batch N N"]) -> Float[Array, "L *batch N N"]:
    """The recursion of `rollout` for any non-negative indicator of each layer.

    Args:
      indicator: `[L, ..., N, N]`, layers in order from the first one.

    Returns:
      `[L, ..., N, N]`, rows sum to 1.
    """
    indicator = normalise_rows(widen(indicator))
    identity = jnp.eye(indicator.shape[-1], dtype=indicator.dtype)
    mixed = normalise_rows(0.5 * indicator + 0.5 * identity)

    def step(so_far: Array, layer: Array) -> tuple[Array, Array]:
        so_far = jnp.matmul(layer, so_far, precision=_EXACT)
        return so_far, so_far

    _, rolled = jax.lax.scan(step, mixed[0], mixed[1:])
    return jnp.concatenate([mixed[:1], rolled])


INDICATORS: dict[str, Callable[..., Array]] = {
    "attention": attention,
    "dispersion": dispersion,
    "value_norm": value_norm,
    "gradient": gradient,
    "leave_one_out": leave_one_out,
    "edge": edge,
    "rollout": rollout,
}

# What each function takes, by the names of `Captures`.
NEEDS: dict[str, tuple[str, ...]] = {
    "attention": ("weights",),
    "dispersion": ("weights",),
    "value_norm": ("weights", "values", "out_kernel"),
    "gradient": ("weights", "values", "output_grad"),
    "leave_one_out": ("weights", "values", "out_kernel"),
    "edge": ("weights", "values", "output_grad"),
    "rollout": ("weights",),
}

UNITS: dict[str, str] = {
    "attention": "share of attention",
    "dispersion": "standard deviation of attention over heads",
    "value_norm": "norm in the residual stream",
    "gradient": "score",
    "leave_one_out": "norm of change in the residual stream",
    "edge": "change of score",
    "rollout": "share of attention",
}


def check_name(name: str) -> None:
    """Raises ValueError, naming the known ones, unless `name` is an indicator."""
    if name not in INDICATORS:
        raise ValueError(f"unknown indicator {name!r}; known: {', '.join(INDICATORS)}")


def compute(name: str, captures: Captures) -> Float[Array, "L B N N"]:
    """An indicator of every captured layer.

    Args:
      name: one of `INDICATORS`.
      captures: what `vi.capture` returned, or your own arrays.

    Raises:
      ValueError: for an unknown name, or when `captures` lacks a tensor that it needs.
    """
    check_name(name)
    arguments = []
    for need in NEEDS[name]:
        tensor = getattr(captures, need)
        if tensor is None:
            raise ValueError(f"{name} needs {', '.join(NEEDS[name])}; captures has no {need}")
        arguments.append(jnp.asarray(tensor))
    if name == "rollout":
        return rollout(*arguments)
    # Layer by layer: temporaries of one layer at a time.
    return jax.lax.map(lambda layer: INDICATORS[name](*layer), tuple(arguments))


class _Cut(NamedTuple):
    """What cutting each edge of one head does to the head's output `o_i`.

    Cutting `j` changes `o_i` by `factor_ij (o_i − v_j)`, except where `dominates`: there it is
    `dominant_change_i`.
    """

    output: Array  # [..., M, K]
    factor: Array  # [..., M, N], A/(1−A), 0 where the key dominates
    dominates: Array  # bool [..., M, N]
    dominant_change: Array  # [..., M, K]


def _cut_edges(weights: Array, values: Array) -> _Cut:
    """Closed form of cutting an edge, without cancellation at weights close to 1.

    With `A → 1`, `A/(1−A) · (o − v)` is a huge number times a difference that rounding ate. At most
    one key of a row has `A > ½`; for it `o' − o = A (o_rest − v)`, where `o_rest` is the output of
    the other keys alone.
    """
    dominates = weights > 0.5
    rest = jnp.where(dominates, 0, weights)
    largest = jnp.sum(jnp.where(dominates, weights, 0), axis=-1, keepdims=True)
    rest_sum = jnp.sum(rest, axis=-1, keepdims=True)
    rest_output = jnp.einsum("...ij,...jk->...ik", rest, values, precision=_EXACT)
    # As a sum, the number of the one key that dominates shares the pass over the row.
    keys = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    which = jnp.sum(jnp.where(dominates, keys, 0), axis=-1)[..., None]
    picked = jnp.take_along_axis(values, which, axis=-2, mode="promise_in_bounds")
    largest_value = jnp.where(largest > 0, picked, 0)
    others = rest_sum > 0
    alone = jnp.where(others, _divide(rest_output, jnp.where(others, rest_sum, 1)), largest_value)
    return _Cut(
        output=rest_output + largest * largest_value,
        factor=rest / (1 - rest),
        dominates=dominates,
        dominant_change=largest * (alone - largest_value),
    )


@jax.custom_jvp
def _divide(numerator: Array, denominator: Array) -> Array:
    """A quotient whose derivative survives a tiny denominator, which jax's own would square."""
    return numerator / denominator


@_divide.defjvp
def _divide_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (numerator, denominator), (by_numerator, by_denominator) = primals, tangents
    quotient = _divide(numerator, denominator)
    return quotient, (by_numerator - quotient * by_denominator) / denominator


def _centred(values: Heads, weights: Array) -> Array:
    """Values minus their mean over tokens: differences stay, the expansion's big terms shrink."""
    values = _like(values, weights)
    return values - jnp.mean(values, axis=-3, keepdims=True)


def _add_heads(per_head: Array) -> Array:
    # One head after the other, not `jnp.sum`: XLA's CPU kernel for a reduction of an axis this far
    # out is slower than the softmax (measured: 10 ms against 0.6 ms of a layer at 1,370 tokens).
    return functools.reduce(jnp.add, jnp.moveaxis(per_head, -3, 0))


def _mean_over_heads(per_head: Array) -> Array:
    return _add_heads(per_head) / per_head.shape[-3]


def _sum_over_heads(add_head: Callable[[Array, Array], Array], weights: Array) -> Array:
    # Zeros that depend on the weights: constant zeros would be one buffer that XLA copies for every
    # layer of a model ahead of time (measured: +70 % temporary memory at 12 layers), and would not
    # vary over a mesh as the loop's result does under shard_map.
    zeros = jax.lax.stop_gradient(jnp.minimum(weights[..., 0, :, :], 0))
    return jax.lax.fori_loop(0, weights.shape[-3], add_head, zeros)


def _pick(array: Array, head: Array, axis: int = -3) -> Array:
    return jax.lax.dynamic_index_in_dim(array, head, axis % array.ndim, keepdims=False)


def _like(array: Array | np.ndarray, weights: Array) -> Array:
    return jnp.asarray(array).astype(weights.dtype)


def _safe_sqrt(squared: Array) -> Array:
    """Square root with gradient 0 at 0, where the true one is infinite."""
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
