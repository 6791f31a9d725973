"""Attention whose weights nobody asks for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vit_interact.models.attend import (
    QueryBlocks,
    attend_in_blocks,
    blocks_over_heads,
    explicit_attention,
    suitable_blocks,
)
from vit_interact.models.bias import SeparableBias
from vit_interact.models.cpu import on_cpu


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """A mask that lets the first tokens alone attend and be attended to, for cuDNN.

    Attributes:
      count: of them. What others get is of no account, but finite.
    """

    count: int


def fused_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    mask: Bool[Array, "..."] | FirstTokens | None = None,
    bias: SeparableBias | None = None,
    blocks: QueryBlocks | None = None,
) -> Float[Array, "*B N H K"]:
    """The output by the fastest way of the device, for arrays as `explicit_attention` takes them.

    On a CPU, `jax.nn.dot_product_attention` is slower than products and softmax written out, and
    makes all weights at once. Those are written out in `blocks`, of `suitable_blocks` by default.
    NVIDIA's GPUs get cuDNN's flash attention where it knows type and width and nothing is masked;
    jax chooses it for nobody. Its derivative is of reverse mode, once.
    """
    if isinstance(mask, FirstTokens):
        return _cudnn_of_first(query, key, value, queries=mask.count, keys=mask.count)
    if blocks is None:
        *batch, queries, heads, _ = query.shape
        shape = (math.prod(batch), heads, queries, key.shape[-3])
        blocks = suitable_blocks(*shape)
        if blocks is not None and bias is None and on_cpu():
            blocks = blocks_over_heads(*shape, maps=False)
    cudnn = mask is None and bias is None and cudnn_takes(query, key, value)
    return _fused_attention(query, key, value, mask, bias, blocks=blocks, cudnn=cudnn)


def attention_of_first(
    query: Float[Array, "*B R H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    mask: Bool[Array, "..."] | FirstTokens | None = None,
) -> Float[Array, "*B R H K"]:
    """The output of the first few queries, whose weights are little on any device."""
    if isinstance(mask, FirstTokens):
        key, value = (side[..., : mask.count, :, :] for side in (key, value))
        mask = None
    if mask is not None:
        mask = mask[..., : query.shape[-3], :]
    return _plain_attention(query, key, value, mask, blocks=None)


# A program of its own: the layers of a model share one trace of it.
@functools.partial(jax.jit, static_argnames=("blocks", "cudnn"))
def _fused_attention(
    query: Array, key: Array, value: Array, mask: Array | None, bias: SeparableBias | None,
    *, blocks: QueryBlocks | None, cudnn: bool,
) -> Array:  # fmt: skip
    plain = functools.partial(_plain_attention, blocks=blocks)
    if bias is not None:
        return plain(query, key, value, mask, bias)
    given = () if mask is None else (mask,)
    ways: dict[str, Callable[..., Array]] = {"cpu": plain}
    if cudnn:
        ways["cuda"] = cudnn_attention
    return lax.platform_dependent(query, key, value, *given, **ways, default=_dot_product_attention)


def cudnn_takes(query: Array, key: Array, value: Array) -> bool:
    """Whether cuDNN attends to such heads here, as far as jax can tell."""
    if not query.dtype == key.dtype == value.dtype:
        return False
    return cudnn_knows(query.dtype, query.shape[-1])


@functools.cache
def cudnn_knows(dtype: Any, width: int) -> bool:
    """Whether cuDNN attends to heads of such a type and width here: 16 bit, NVIDIA, not too old."""
    if dtype not in (jnp.bfloat16, jnp.float16) or jax.default_backend() != "gpu":
        return False
    heads = jax.ShapeDtypeStruct((1, 7, 1, width), dtype)
    try:
        jax.eval_shape(jax.grad(lambda *x: cudnn_attention(*x).sum()), heads, heads, heads)
    except (RuntimeError, NotImplementedError, ValueError):
        return False  # an old GPU or cuDNN, another maker's, or a width that it does not know
    return True


@jax.custom_vjp
def cudnn_attention(
    query: Float[Array, "*B N H K"], key: Float[Array, "*B M H K"], value: Float[Array, "*B M H K"]
) -> Float[Array, "*B N H K"]:
    """CuDNN's flash attention, where `cudnn_takes` the arrays; `query` is scaled already."""
    whole = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    return _cudnn(*whole).reshape(query.shape)


def _cudnn_fwd(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
    return jax.vjp(_cudnn_of_even, query, key, value)


def _cudnn_bwd(pull: Any, grad: Array) -> tuple[Array, ...]:
    return pull(grad)


cudnn_attention.defvjp(_cudnn_fwd, _cudnn_bwd)


def _cudnn(query: Array, key: Array, value: Array, **lengths: Any) -> Array:
    return jax.nn.dot_product_attention(
        query, key, value, scale=1.0, implementation="cudnn", **lengths
    )


def _cudnn_of_even(query: Array, key: Array, value: Array) -> Array:
    """Where tokens are odd, with one more that nobody attends to: so the derivative wants them."""
    whole = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    counts = [x.shape[1] for x in whole[:2]]
    if not any(count % 2 for count in counts):
        return _cudnn(*whole).reshape(query.shape)
    even = [jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in whole]
    first = _cudnn_of_first(*even, queries=counts[0], keys=counts[1])
    return first[:, : counts[0]].reshape(query.shape)


def _cudnn_of_first(query: Array, key: Array, value: Array, *, queries: int, keys: int) -> Array:
    """Of the first tokens of `[B, N, H, K]`, an even number; zeros for the others."""
    of_queries, of_keys = (jnp.full(len(query), count, jnp.int32) for count in (queries, keys))
    return _cudnn(query, key, value, query_seq_lengths=of_queries, key_value_seq_lengths=of_keys)


def _plain_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    bias: SeparableBias | None = None,
    *,
    blocks: QueryBlocks | None,
) -> Array:
    """The same output by products and softmax, all at once or in blocks."""
    if blocks is None:
        full = None if bias is None else bias.full(key.shape[-3])
        return explicit_attention(query, key, value, full, mask, scale_output=True).output
    return attend_in_blocks((query, key, value, bias, mask, None), blocks)[0]


def _dot_product_attention(
    query: Array, key: Array, value: Array, mask: Array | None = None
) -> Array:
    output = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=1.0)
    if mask is not None:
        # jax attends uniformly in a row with every key masked; ours contributes nothing.
        attends = jnp.any(mask, axis=-1)  # [B or 1, H or 1, N or 1]
        output = jnp.where(jnp.swapaxes(attends, -1, -2)[..., None], output, 0)
    return output
