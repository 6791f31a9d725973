"""Attention with taps: a fused path, an explicit path, and what can be read from the latter.

The mathematics are pure functions; Flax only holds parameters. Two kinds of tap exist:

* **Forward taps** are sown into the `intermediates` collection: raw tensors, or whatever
  `Taps.reduce` makes of them, so that `[B, H, N, N]` can shrink to `[B, N, N]` inside the layer.
* **Gradient taps** need `g = ds/do`. A layer that finds a zero "sink" in the `sinks` collection
  makes the reduction of `g` the cotangent of that sink (`gradient_tap`). One `jax.grad` with
  respect to the sinks then gives every layer's reduction in one backward pass, and the stack of
  all `g` never exists.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

KINDS = ("weights", "logits", "values", "output", "query", "key")
SINKS = "sinks"
# Sown names start so, since a module already has submodules called `query` and `key`.
PREFIX = "attention_"


class Attended(NamedTuple):
    """Everything one attention layer computed.

    Attributes:
      query: `[B, N, H, K]`, scaled by `1/sqrt(K)`.
      key: `[B, N, H, K]`.
      values: `[B, N, H, K]`.
      logits: `[B, H, N, N]` after mask and bias, float32 or wider.
      weights: `[B, H, N, N]`, rows sum to 1, float32 or wider.
      output: `[B, N, H, K]`, one output for each head.
      out_kernel: `[H, K, D]`, multiplied by LayerScale where the model has it; None when unknown.
    """

    query: Array
    key: Array
    values: Array
    logits: Array
    weights: Array
    output: Array
    out_kernel: Array | None


@struct.dataclass
class SeparableBias:
    """An additive bias on patch-to-patch logits that is a sum of a row and a column factor.

    The logit of query patch `i` and key patch `(r, c)` gets `rows[..., i, r] + cols[..., i, c]`.
    Prefix tokens get none.

    Attributes:
      rows: `[B, H', P, R]`, `H'` being 1 or the number of heads.
      cols: `[B, H', P, C]`.
    """

    rows: Array
    cols: Array

    def full(self, tokens: int) -> Float[Array, "B G N N"]:
        """The bias over all `tokens`, 0 for the prefix tokens that stand before the patches."""
        total = self.rows[..., :, :, None] + self.cols[..., :, None, :]
        total = total.reshape(*total.shape[:-2], -1)
        prefix = tokens - total.shape[-1]
        return jnp.pad(total, [(0, 0)] * (total.ndim - 2) + [(prefix, 0)] * 2)


@dataclasses.dataclass(frozen=True)
class Taps:
    """What attention layers shall give away; static under `jit`.

    Attributes:
      kinds: raw tensors to sow, of `KINDS`.
      layers: layers that sow (None: all). A scanned model sows all; the reader selects.
      reduce: maps `Attended` to a dict of arrays to sow, inside the layer.
      reduce_grad: maps `(Attended, g [B, N, H, K])` to a dict of arrays with the keys and shapes
        of the layer's sinks.
    """

    kinds: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    reduce: Callable[[Attended], dict[str, Array]] | None = None
    reduce_grad: Callable[[Attended, Array], dict[str, Array]] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"attention cannot sow {unknown}; it can sow {KINDS}")


def attention_logits(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    bias: Float[Array, ...] | None = None,
    mask: Bool[Array, ...] | None = None,
) -> Float[Array, "*B H N M"]:
    """`query · key` plus bias, masked entries at the type's lowest number; float32 or wider."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query, key = _heads_first(query), _heads_first(key)
    logits = jnp.einsum("...hik,...hjk->...hij", query, key, preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    return logits


def attention_weights(
    logits: Float[Array, "*B H N M"], mask: Bool[Array, ...] | None = None
) -> Float[Array, "*B H N M"]:
    """Softmax over keys; a row with every key masked is 0 instead of uniform or NaN."""
    weights = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        # Zeroing masked keys once more matters in rows that mask all of them.
        weights = jnp.where(mask, weights, 0)
    return weights


def explicit_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    bias: Float[Array, ...] | None = None,
    mask: Bool[Array, ...] | None = None,
    out_kernel: Float[Array, "H K D"] | None = None,
) -> Attended:
    """Attention that keeps its weights. `query` is already scaled; see `Attended` for shapes."""
    logits = attention_logits(query, key, bias, mask)
    weights = attention_weights(logits, mask)
    output = jnp.einsum("...hij,...hjk->...hik", weights.astype(value.dtype), _heads_first(value))
    output = jnp.swapaxes(output, -2, -3)
    return Attended(query, key, value, logits, weights, output, out_kernel)


def _heads_first(array: Float[Array, "*B N H K"]) -> Float[Array, "*B H N K"]:
    """Small tensors are transposed, so that no product needs its weights `[H, N, N]` transposed.

    XLA's CPU compiler does that for the einsum `...hij,...jhk->...ihk`.
    """
    return jnp.swapaxes(array, -2, -3)


def fused_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    mask: Bool[Array, ...] | None = None,
) -> Float[Array, "*B N H K"]:
    """The same output through `jax.nn.dot_product_attention`; weights are not available.

    On CPU that function transposes the weights and takes up to twice as long as our own
    (docs/benchmarks.md), so there it is `explicit_attention`.
    """
    if jax.default_backend() == "cpu":
        return explicit_attention(query, key, value, mask=mask).output
    output = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=1.0)
    if mask is not None:
        # jax attends uniformly in a row with every key masked; ours contributes nothing.
        attends = jnp.any(mask, axis=-1)  # [B or 1, H or 1, N or 1]
        output = jnp.where(jnp.swapaxes(attends, -1, -2)[..., None], output, 0)
    return output


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gradient_tap(
    reduce_grad: Callable[[Attended, Array], dict[str, Array]],
    output: Array,
    sinks: dict[str, Array],
    inputs: tuple[Any, ...],
) -> Array:
    """Returns `output`; in the backward pass, `reduce_grad(attended, g)` becomes d/d`sinks`.

    The weights are recomputed from `inputs = (query, key, value, bias, mask, out_kernel)`, so
    nothing but what the layer's own backward pass keeps is held for it.
    """
    del reduce_grad, sinks, inputs
    return output


def _gradient_tap_fwd(
    reduce_grad: Any, output: Array, sinks: dict[str, Array], inputs: tuple[Any, ...]
) -> tuple[Array, tuple[Any, ...]]:
    del reduce_grad, sinks
    return output, inputs


def _gradient_tap_bwd(reduce_grad: Any, inputs: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    return g, reduce_grad(explicit_attention(*inputs), g), None


gradient_tap.defvjp(_gradient_tap_fwd, _gradient_tap_bwd)


def _sow(module: nn.Module, taps: Taps, attended: Attended) -> None:
    for kind in taps.kinds:
        module.sow("intermediates", PREFIX + kind, getattr(attended, kind))
    if taps.reduce is not None:
        for name, value in taps.reduce(attended).items():
            module.sow("intermediates", PREFIX + name, value)


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head attention with big_vision's parameter names and the taps of this file.

    Attributes:
      heads: heads `H`.
      qk_norm: LayerNorm of queries and keys in each head.
      norm_eps: its epsilon.
      taps: what to give away; None takes the fused path.
      dtype: compute type.
    """

    heads: int
    qk_norm: bool = False
    norm_eps: float = 1e-6
    taps: Taps | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "B N D"],
        inputs_kv: Float[Array, "B M D"],
        mask: Bool[Array, ...] | None = None,
        bias: SeparableBias | None = None,
        layer_scale: Float[Array, " D"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Attends.

        Args:
          inputs_q: what queries are made from, `[B, N, D]`.
          inputs_kv: what keys and values are made from, `[B, M, D]`.
          mask: True = attend; `[N, M]`, `[B, N, M]` or `[B, H, N, M]`.
          bias: additive separable bias of the logits.
          layer_scale: the block's LayerScale `[D]`, only for the taps' `out_kernel`.
        """
        width = inputs_q.shape[-1]
        head_dim = width // self.heads

        def project(name: str, inputs: Array) -> Array:
            return nn.DenseGeneral((self.heads, head_dim), dtype=self.dtype, name=name)(inputs)

        query, key = project("query", inputs_q), project("key", inputs_kv)
        value = project("value", inputs_kv)
        if self.qk_norm:
            norm = functools.partial(
                nn.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False
            )
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        query = query * (head_dim**-0.5)
        mask = _with_heads(mask)
        logit_bias = None if bias is None else bias.full(tokens=inputs_kv.shape[1])
        project_out = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")

        taps = self.taps
        sinks = self.get_variable(SINKS, "attention") if taps and taps.reduce_grad else None
        if not taps and logit_bias is None:
            return project_out(fused_attention(query, key, value, mask))

        attended = explicit_attention(query, key, value, logit_bias, mask)
        if taps and not self.is_initializing():
            # The kernel exists before it is used: parameters were made by `init`.
            kernel: Any = self.get_variable("params", "out")["kernel"]
            attended = attended._replace(
                out_kernel=kernel if layer_scale is None else kernel * layer_scale
            )
            _sow(self, taps, attended)
            if sinks is not None:
                inputs = (query, key, value, logit_bias, mask, attended.out_kernel)
                tapped = gradient_tap(taps.reduce_grad, attended.output, sinks, inputs)
                attended = attended._replace(output=tapped)
        return project_out(attended.output)


def _with_heads(mask: Array | None) -> Array | None:
    """`[N, M]` or `[B, N, M]` as something that broadcasts to `[B, H, N, M]`."""
    if mask is None:
        return None
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"mask has shape {mask.shape}; expected [N, N], [B, N, N] or [B, H, N, N]")
    return mask if mask.ndim == 4 else jnp.expand_dims(mask, -3)


class AttentionTap(nn.Module):
    """The parameter-free submodule through which `attention_fn` sows inside a foreign module."""

    @nn.compact
    def __call__(
        self, query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None
    ) -> tuple[Array, Array]:
        """Heads' outputs `[..., N, H, K]` and weights `[..., H, N, M]`."""
        attended = explicit_attention(query, key, value, bias, mask)
        _sow(self, Taps(kinds=KINDS), attended)
        if self.has_variable(SINKS, "attention"):
            sinks: Any = self.get_variable(SINKS, "attention")
            inputs = (query, key, value, bias, mask, None)
            tapped = gradient_tap(output_gradient, attended.output, sinks, inputs)
            return tapped, attended.weights
        return attended.output, attended.weights


def output_gradient(attended: Attended, g: Array) -> dict[str, Array]:
    """A `Taps.reduce_grad` that gives `g = ds/do` itself, under the name `grad`."""
    del attended
    return {"grad": g}


def attention_fn(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    bias: Float[Array, ...] | None = None,
    mask: Bool[Array, ...] | None = None,
    *,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    module: nn.Module | None = None,
    **kwargs: Any,
) -> Float[Array, "*B N H K"]:
    """A drop-in for `nn.MultiHeadDotProductAttention(attention_fn=...)` in any linen model.

    Parameters and outputs of the model stay what they were. When `vi.capture` or `vi.measure` runs
    the model, this function sows what they need; otherwise it is `nn.dot_product_attention`.

    Args:
      query: `[..., N, H, K]`, not yet scaled.
      key: `[..., M, H, K]`.
      value: `[..., M, H, K]`.
      bias: added to the logits, broadcastable to `[..., H, N, M]`.
      mask: True = attend, broadcastable to `[..., H, N, M]`.
      dropout_rate: as in Flax.
      deterministic: as in Flax; weights that dropout changed are never captured.
      module: where Flax's own `sow_weights=True` wants the weights sown.
      **kwargs: the rest of Flax's arguments.

    Raises:
      ValueError: when weights are captured while dropout is active.
    """
    tap = AttentionTap()
    if not isinstance(tap.parent, nn.Module):
        raise ValueError("attention_fn works inside a linen module: pass it as attention_fn=...")
    if tap.parent.is_initializing() or not tap.parent.is_mutable_collection("intermediates"):
        return nn.dot_product_attention(
            query, key, value, bias, mask,
            dropout_rate=dropout_rate, deterministic=deterministic, module=module, **kwargs,
        )  # fmt: skip
    if dropout_rate > 0 and not deterministic:
        raise ValueError("weights cannot be captured under dropout: run the model deterministic")
    scaled = query * (query.shape[-1] ** -0.5)
    output, weights = tap(scaled, key, value, bias, mask)
    if module is not None:
        module.sow("intermediates", "attention_weights", weights)
    return output


# Flax hands over only arguments that the signature names, and its versions name different ones.
attention_fn.__signature__ = inspect.signature(nn.dot_product_attention)  # type: ignore[attr-defined]
