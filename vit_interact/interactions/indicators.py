"""Indicators: the impact of token `j` on token `i` in one attention layer, as pure functions.

Definitions and sources are in docs/method.md. All functions take any leading axes, accept bf16,
compute in float32 (or float64 when the weights are), and work under `jit`, `vmap`, `grad` and
sharding. Axes: `H` heads, `M` queries, `N` tokens, `K` width of a head, `D` width of the model.

Rows do not depend on one another: `M` is `N` for all queries of a layer, or fewer for a block of
them. So the functions that take whole layers also are the ones that blockwise attention calls.

Heads are visited one after the other, or some together where they are small: what exists at a time
is `[..., M, N]`, never a large `[..., H, M, N]` beyond the weights that came in, and never
`[..., M, N, K]`. Those that visit heads are jitted: the layers of a model share one trace of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.interactions.by_head import (
    is_single,
    mean_over_heads,
    of_one,
    sum_over_heads,
    where_dominated,
)
from vit_interact.interactions.head_terms import (
    EXACT,
    cut_by_logits,
    cut_dominant_by_logits,
    leave_one_out_dominant,
    leave_one_out_squared,
    metric_of,
    safe_sqrt,
)
from vit_interact.interactions.views import normalise_rows, widen

Weights = Float[Array, "*batch H M N"] | Float[np.ndarray, "*batch H M N"]
Heads = Float[Array, "*batch N H K"] | Float[np.ndarray, "*batch N H K"]
Gradients = Float[Array, "*batch M H K"] | Float[np.ndarray, "*batch M H K"]
Kernel = Float[Array, "H K D"] | Float[np.ndarray, "H K D"]
Maps = Float[Array, "*batch M N"]


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
    return mean_over_heads(widen(weights))


def dispersion(weights: Weights) -> Float[Array, "*batch M N"]:
    """Population standard deviation over heads of the attention weights.

    Variance over heads as a sign of importance follows Igaue & Aizawa (2025).

    Args:
      weights: attention weights `[..., H, M, N]`.

    Returns:
      `[..., M, N]`, a share of attention (no unit).
    """
    weights = widen(weights)
    mean = mean_over_heads(weights)[..., None, :, :]
    return safe_sqrt(mean_over_heads(jnp.square(weights - mean)))


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
    if is_single(weights.shape[:-3]):
        return of_one(value_norm, weights, values, out_kernel)
    weights = widen(weights)
    values, kernel = _like(values, weights), _like(out_kernel, weights)

    def gram_of_head(head: tuple[Array, Array]) -> Array:
        own, own_kernel = head
        # Within the loop, or XLA makes those of all layers ahead of time.
        metric = jnp.einsum("kd,gld->gkl", own_kernel, kernel, precision=EXACT)
        moved = jnp.einsum("...jk,gkl->...jgl", own, metric, precision=EXACT)
        return jnp.sum(moved * values, axis=-1)

    # By the heads' small matrices, not by values in the residual stream: `[..., N, H, D]` is large.
    gram = jax.lax.map(gram_of_head, (jnp.moveaxis(values, -2, 0), kernel))
    gram = jnp.moveaxis(gram, -1, 1)[..., None, :]
    each = jnp.moveaxis(weights, -3, 0)
    squared = jnp.zeros_like(each[0])
    # All pairs of heads in one loop over edges; each pair counts twice, and is made once.
    for h, own in enumerate(each):
        others = gram[h, h] * own
        for g in range(h):
            others += 2 * gram[h, g] * each[g]
        squared += own * others
    return safe_sqrt(squared)


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
    if is_single(weights.shape[:-3]):
        return of_one(gradient, weights, values, output_grad)
    weights = widen(weights)
    values, output_grad = _like(values, weights), _like(output_grad, weights)

    def of_head(weights: Array, v: Array, g: Array) -> Array:
        slope = jnp.einsum("...ik,...jk->...ij", g, v, precision=EXACT)
        return jax.nn.relu(weights * slope)

    total = sum_over_heads(of_head, weights, (values, -2), (output_grad, -2))
    return total / weights.shape[-3]


@jax.jit
def leave_one_out(
    weights: Weights, values: Heads, out_kernel: Kernel, output: Gradients | None = None
) -> Float[Array, "*batch M N"]:
    """Size of the change of the attention update of `i` when the edge from `j` is cut.

    `sqrt( sum_h ‖ c_ij^h (o_i^h − v_j^h) W_h ‖² )` with `c = A/(1−A)`: the closed form of masking
    one key and renormalising the softmax, root sum of squares over heads (docs/method.md).

    Args:
      weights: attention weights `[..., H, M, N]`.
      values: `[..., N, H, K]`.
      out_kernel: `[H, K, D]`.
      output: of each head, `[..., M, H, K]`; made anew without it, or where its type is narrower
        than that of the weights.

    Returns:
      `[..., M, N]`, in units of the residual stream. 0 where `i` attends to nothing else.
    """
    if is_single(weights.shape[:-3]):
        given = () if output is None else (output,)
        return of_one(leave_one_out, weights, values, out_kernel, *given)
    weights = widen(weights)
    metric = metric_of(_like(out_kernel, weights))  # M_h = W_h W_hᵀ
    mean = jnp.mean(_like(values, weights), axis=-3, keepdims=True)
    # Differences stay, the big terms of the expansion below shrink.
    v = jnp.swapaxes(_like(values, weights) - mean, -3, -2)  # [..., H, N, K]
    if output is None or output.dtype != weights.dtype:
        o = jnp.einsum("...hij,...hjk->...ihk", weights, v, precision=EXACT)
    else:
        o = jnp.asarray(output) - mean

    sides = ((v, -3), (o, -2), (metric, -3))
    dominant = where_dominated(leave_one_out_dominant, weights, *sides)
    return safe_sqrt(sum_over_heads(leave_one_out_squared, weights, (dominant, -3), *sides))


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
    if is_single(weights.shape[:-3]):
        return of_one(functools.partial(edge, signed=signed), weights, values, output_grad)
    weights = widen(weights)
    values, output_grad = _centred(values, weights), _like(output_grad, weights)

    def of_head(weights: Array, v: Array, g: Array) -> Array:
        slope = jnp.einsum("...ik,...jk->...ij", g, v, precision=EXACT)
        own = jnp.sum(weights * slope, axis=-1, keepdims=True)
        logit_grad = weights * (slope - own)
        dominant = cut_dominant_by_logits(weights, logit_grad)
        return cut_by_logits(weights, logit_grad, dominant)

    total = sum_over_heads(of_head, weights, (values, -2), (output_grad, -2))
    return total if signed else jnp.abs(total)


@jax.jit
def gradient_of_logits(weights: Array, logit_grad: Array, along: Array) -> Maps:
    """`gradient`, from what a layer's own backward pass has made already.

    `A g_i·v_j = ∂s/∂z_ij + A g_i·o_i`.

    Args:
      weights: attention weights `[..., H, M, N]`.
      logit_grad: derivative of the score by the logits `z`, `[..., H, M, N]`.
      along: `g_i·o_i`, `[..., H, M]`.
    """
    if is_single(weights.shape[:-3]):
        return of_one(gradient_of_logits, weights, logit_grad, along[..., None])
    along = along.reshape(*weights.shape[:-1], 1)

    def of_head(weights: Array, logit_grad: Array, along: Array) -> Array:
        return jax.nn.relu(logit_grad + weights * along)

    return sum_over_heads(of_head, weights, (logit_grad, -3), (along, -3)) / weights.shape[-3]


@jax.jit
def edge_of_logits(weights: Array, logit_grad: Array) -> Maps:
    """`edge`, from what a layer's own backward pass has made already.

    Args:
      weights: attention weights `[..., H, M, N]`.
      logit_grad: derivative of the score by the logits, `[..., H, M, N]`.
    """
    if is_single(weights.shape[:-3]):
        return of_one(edge_of_logits, weights, logit_grad)
    sides = ((logit_grad, -3),)
    dominant = where_dominated(cut_dominant_by_logits, weights, *sides)
    return jnp.abs(sum_over_heads(cut_by_logits, weights, *sides, (dominant, -3)))


def rollout(weights: Float[Array, "L *batch H N N"]) -> Float[Array, "L *batch N N"]:
    """Attention rolled through the layers, with half of each layer on the residual path.

    `M_l M_{l−1} ⋯ M_1` with `M = rownorm(½ mean_h A + ½ I)`, after Abnar & Zuidema (2020).

    Args:
      weights: attention weights of all layers from the first one, `[L, ..., H, N, N]`.

    Returns:
      `[L, ..., N, N]`: the rollout through each layer; the last is the rollout of the model.
    """
    if not is_single(weights.shape[1:-3]):
        return roll(attention(weights))
    flat = jnp.asarray(weights).reshape(weights.shape[0], *weights.shape[-3:])
    found = roll(attention(flat))
    return found.reshape(*weights.shape[:-3], *found.shape[-2:])


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
        so_far = jnp.matmul(layer, so_far, precision=EXACT)
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


def _centred(values: Heads, weights: Array) -> Array:
    """Values minus their mean over tokens: differences stay, the expansion's big terms shrink."""
    values = _like(values, weights)
    return values - jnp.mean(values, axis=-3, keepdims=True)


def _like(array: Array | np.ndarray, weights: Array) -> Array:
    return jnp.asarray(array).astype(weights.dtype)
