"""Attention with taps: what can be read from a layer, and the Flax modules that give it.

The mathematics are pure functions (`models/attend.py`); Flax only holds parameters. Two kinds of
tap exist:

* **Forward taps** are sown into the `intermediates` collection: raw tensors, or whatever
  `Taps.reduce` makes of them, so that `[B, H, N, N]` can shrink to `[B, N, N]` inside the layer.
* **Gradient taps** need `g = ds/do`. A layer that finds a zero "sink" in the `sinks` collection
  makes the reduction of `g` the derivative by that sink (`_attend_with_sinks`). One `jax.grad` with
  respect to the sinks then gives every layer's reduction in one backward pass, and the stack of
  all `g` never exists.

With `Taps.blocks` a layer never holds `[B, H, N, N]`: reductions see one block of queries after the
other, forward and backward.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit_interact.models.attend import (
    Attended,
    QueryBlocks,
    Tiles,
    attend_in_blocks,
    explicit_attention,
)
from vit_interact.models.attend_backward import attention_gradients, gradients_in_blocks
from vit_interact.models.bias import SeparableBias
from vit_interact.models.cpu import on_cpu
from vit_interact.models.dense import Dense
from vit_interact.models.elementwise import LayerNorm
from vit_interact.models.fused import FirstTokens, attention_of_first, fused_attention
from vit_interact.models.softmax import ROWS, Rows

KINDS = ("weights", "logits", "values", "output", "query", "key")
SINKS = "sinks"
# Sown names start so, since a module already has submodules called `query` and `key`.
PREFIX = "attention_"


@dataclasses.dataclass(frozen=True)
class Taps:
    """What attention layers shall give away; static under `jit`.

    Attributes:
      kinds: raw tensors to sow, of `KINDS`.
      layers: layers that sow (None: all). A scanned model sows all; the reader selects.
      reduce: maps `Attended` to a dict of arrays to sow, inside the layer.
      reduce_grad: maps `(Attended, g [B, N, H, K])` to a dict of arrays with the keys and shapes
        of the layer's sinks.
      blocks: None gives reductions all queries at once; else they get one block after the other,
        and return arrays `[B, M, ...]` or `Summed` ones. `Tiles` gives them a `tiled.Tiled`, which
        has no weights. Raw tensors cannot be sown then.
      only_graded: leaves out queries that the score does not depend on, those of the last layer
        whose tokens nobody reads; rows of `reduce_grad` are zero there. Without `reduce`.
    """

    kinds: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    reduce: Callable[[Any], dict[str, Any]] | None = None
    reduce_grad: Callable[[Any, Array], dict[str, Any]] | None = None
    blocks: QueryBlocks | Tiles | None = None
    only_graded: bool = False

    def __post_init__(self) -> None:
        if self.only_graded and (self.kinds or self.reduce):
            raise ValueError("what a forward pass gives is of all queries: only_graded=False")
        if self.kinds and self.blocks:
            raise ValueError("raw tensors are of whole layers: blocks=None")
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"attention cannot sow {unknown}; it can sow {KINDS}")


def _attend_in_tiles(*arguments: Any) -> tuple[Array, dict[str, Any]]:
    # Only here: Pallas takes a while to load, and few ask for it.
    from vit_interact.models.tiled import attend_in_tiles

    return attend_in_tiles(*arguments)


# A program of its own, as is the backward pass: the layers of a model share one trace.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _attend(
    taps: Taps, inputs: tuple[Any, ...], keep: bool = False
) -> tuple[Array, dict[str, Any], Rows | None]:
    """Each head's output, what `taps` asks for of the forward pass, and rows of its softmax.

    Rows only with `keep` and in blocks: else, on a CPU, YNNPACK makes weights of several short
    images in one loop, and is faster where nothing of it is wanted outside (docs/performance.md).
    """
    if isinstance(taps.blocks, QueryBlocks) and (taps.reduce or (keep and on_cpu())):
        output, found = attend_in_blocks(inputs, taps.blocks, taps.reduce, keep=keep)
        rows = Rows(*(found.pop(name) for name in ROWS)) if keep else None
        return output, found, rows
    if isinstance(taps.blocks, QueryBlocks):
        query, key, value, bias, mask, _ = inputs
        return fused_attention(query, key, value, mask, bias, taps.blocks), {}, None
    if taps.blocks is not None:
        return *_attend_in_tiles(inputs, taps.blocks, taps.reduce), None
    attended = explicit_attention(*inputs)
    sown = {kind: getattr(attended, kind) for kind in taps.kinds}
    sown |= taps.reduce(attended) if taps.reduce else {}
    return attended.output, sown, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_with_sinks(
    taps: Taps, sinks: dict[str, Array], inputs: tuple[Any, ...]
) -> tuple[Array, dict[str, Any]]:
    """`_attend`; in the backward pass, `taps.reduce_grad(attended, g)` becomes d/d`sinks`.

    The weights are made again from `inputs = (query, key, value, bias, mask, out_kernel)`, in
    `taps.blocks` if given, once for the layer's own derivative and the reduction.
    """
    del sinks
    return _attend(taps, inputs)[:2]


def _attend_with_sinks_fwd(taps: Taps, sinks: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    del sinks
    output, sown, rows = _attend(taps, inputs, True)
    return (output, sown), (output, rows, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _attend_with_sinks_bwd(
    taps: Taps, kept: tuple[Any, ...], gradients: tuple[Array, Any]
) -> tuple[Any, ...]:
    (output, rows, inputs), (g, _) = kept, gradients
    reduce_grad: Any = taps.reduce_grad
    if isinstance(taps.blocks, QueryBlocks):
        sides, found = gradients_in_blocks(inputs, taps.blocks, reduce_grad, output, g, rows)
    elif taps.blocks is not None:
        found = _attend_in_tiles(inputs, taps.blocks, reduce_grad, g)[1]
        alone = lambda *sides: _attend_in_tiles((*sides, *inputs[3:]), taps.blocks)[0]  # noqa: E731
        sides = (*jax.vjp(alone, *inputs[:3])[1](g), None)
    else:
        attended = explicit_attention(*inputs)
        sides, made = attention_gradients(attended, output, g, inputs[3])
        found = reduce_grad(attended._replace(backward=made), g)
    left_out = inputs[1].shape[1] - inputs[0].shape[1]
    if left_out:
        found = jax.tree.map(
            lambda rows: jnp.pad(rows, [(0, 0), (0, left_out), *[(0, 0)] * (rows.ndim - 2)]), found
        )
    return found, (*sides, None, None)


_attend_with_sinks.defvjp(_attend_with_sinks_fwd, _attend_with_sinks_bwd)


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
        mask: Bool[Array, "..."] | FirstTokens | None = None,
        bias: SeparableBias | None = None,
        layer_scale: Float[Array, " D"] | None = None,
        first_tokens: int | None = None,
    ) -> Float[Array, "B R D"]:
        """Attends.

        Args:
          inputs_q: what queries are made from, `[B, N, D]`.
          inputs_kv: what keys and values are made from, `[B, M, D]`.
          mask: True = attend; `[N, M]`, `[B, N, M]` or `[B, H, N, M]`. `FirstTokens` where there
            are no taps.
          bias: additive separable bias of the logits.
          layer_scale: the block's LayerScale `[D]`, only for the taps' `out_kernel`.
          first_tokens: how many of the queries' outputs are wanted; None is all. Taps see all but
            for `Taps.only_graded`.
        """
        width = inputs_q.shape[-1]
        taps = None if self.is_initializing() else self.taps
        graded = taps and taps.only_graded and not isinstance(taps.blocks, Tiles)
        few = first_tokens is not None and bias is None and (not taps or graded)
        inputs_q = inputs_q[:, :first_tokens] if few else inputs_q
        head_dim = width // self.heads

        def project(name: str, inputs: Array, scale: float = 1.0) -> Array:
            return Dense((self.heads, head_dim), dtype=self.dtype, scale=scale, name=name)(inputs)

        scale = head_dim**-0.5
        query = project("query", inputs_q, 1.0 if self.qk_norm else scale)
        key, value = project("key", inputs_kv), project("value", inputs_kv)
        if self.qk_norm:
            norm = functools.partial(LayerNorm, self.norm_eps, self.dtype)
            query, key = norm(name="query_norm")(query) * scale, norm(name="key_norm")(key)
        mask = _with_heads(mask)
        project_out = Dense(width, axes=2, dtype=self.dtype, name="out")

        if not taps:
            if few:
                return project_out(attention_of_first(query, key, value, mask))
            output = fused_attention(query, key, value, mask, bias)
            return project_out(output[:, :first_tokens])
        if few:
            taps = dataclasses.replace(taps, blocks=None)
            given: Any = mask
            mask = None if given is None else given[..., :first_tokens, :]
        logit_bias: Any = bias
        if bias is not None and not taps.blocks:
            logit_bias = bias.full(tokens=inputs_kv.shape[1])
        # The kernel exists before it is used: parameters were made by `init`.
        kernel: Any = self.get_variable("params", "out")["kernel"]
        scaled = kernel if layer_scale is None else kernel * layer_scale
        inputs = (query, key, value, logit_bias, mask, scaled)
        if taps.reduce_grad and self.has_variable(SINKS, "attention"):
            sinks: Any = self.get_variable(SINKS, "attention")
            output, sown = _attend_with_sinks(taps, sinks, inputs)
        else:
            output, sown, _ = _attend(taps, inputs)
        for name, found in sown.items():
            self.sow("intermediates", PREFIX + name, found)
        return project_out(output[:, :first_tokens])


def _with_heads(mask: Any) -> Any:
    """`[N, M]` or `[B, N, M]` as something that broadcasts to `[B, H, N, M]`."""
    if mask is None or isinstance(mask, FirstTokens):
        return mask
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
        for kind in KINDS:
            self.sow("intermediates", PREFIX + kind, getattr(attended, kind))
        if self.has_variable(SINKS, "attention"):
            sinks: Any = self.get_variable(SINKS, "attention")
            return attended.output + sinks["grad"], attended.weights
        return attended.output, attended.weights


def output_gradient(attended: Attended, g: Array) -> dict[str, Array]:
    """A `Taps.reduce_grad` that gives `g = ds/do` itself, under the name `grad`."""
    del attended
    return {"grad": g}


def attention_fn(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
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
