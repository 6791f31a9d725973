"""Attention within windows that skips the keys that no window of a block of queries reaches.

Patches are put into compact blocks, stretches of a Hilbert curve. A block of queries needs a block
of keys when one of its windows reaches into it. For each block of queries the needed blocks are
listed, and a loop of just as many steps goes through the list with a running softmax (Milakov &
Gimelshein 2018, as in FlashAttention), forward and backward. Lists have room for all blocks, so
windows of any size and shape give the right result: large ones only save nothing.

This is for the CPU. Elsewhere a loop of small steps leaves the device idle, so there the windows
become a mask of `jax.nn.dot_product_attention`, or `kernel="pallas"` skips keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vit_interact.interactions.window_masks import window_mask
from vit_interact.layout import TokenLayout
from vit_interact.models.attend import explicit_attention
from vit_interact.models.fused import fused_attention
from vit_interact.models.patch_blocks import needed_blocks, patch_blocks

# Blocks of keys a step at most: XLA's CPU multiplies small matrices slowly.
_SPAN = 2
_LOWEST = -1e30  # below every logit, and far above the -3.4e38 of masked ones: exp gives 0


def computed_share(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"],
    layout: TokenLayout,
) -> Float[Array, "*batch"]:
    """Products of queries and keys that `window_attention` computes, over those of dense attention.

    Prefix tokens, filling and rounding up to whole steps included: what the time should follow.

    Args:
      windows: (top, left, bottom, right) of each query patch `[..., P, 4]`, exclusive at the end.
      layout: the grid of patches and the prefix tokens.
    """
    count, size = patch_blocks(layout).patches.shape
    span = _span(layout)
    steps = -(-needed_blocks(windows, layout).sum(axis=-1) // span)
    patches = steps.sum(axis=-1) * span * size**2
    prefix = layout.prefix * (layout.num_tokens + count * size)
    return (patches + prefix) / layout.num_tokens**2


def _span(layout: TokenLayout) -> int:
    """Blocks of keys a step."""
    return min(_SPAN, len(patch_blocks(layout).patches))


def window_attention(
    query: Float[Array, "*batch N H K"],
    key: Float[Array, "*batch N H K"],
    value: Float[Array, "*batch N H K"],
    windows: Int[Array, "*windows P 4"] | Int[np.ndarray, "*windows P 4"],
    layout: TokenLayout,
    kernel: str | None = None,
) -> Float[Array, "*batch N H K"]:
    """Attention with `window_mask(windows)`, without the work on keys outside of all windows.

    Once differentiable, by hand-written loops. Images are worked on one after the other on a CPU:
    with leading axes sharded over devices, call it inside `jax.shard_map`.

    Args:
      query: scaled by `1/sqrt(K)`, `[..., N, H, K]`.
      key: `[..., N, H, K]`.
      value: `[..., N, H, K]`.
      windows: (top, left, bottom, right) of each query patch, exclusive at the end: `[..., P, 4]`,
        or `[P, 4]` for all images. Each holds its own patch.
      layout: the grid of patches and the prefix tokens; these see and are seen by all.
      kernel: "pallas" for the kernels of `models/pallas_boxes.py` on a GPU, where the grid has a
        tile of them, and of `models/pallas_windows.py` on a TPU; None for XLA, which skips keys on
        a CPU only.

    Returns:
      Each head's output `[..., N, H, K]`.

    Raises:
      ValueError: if there is not one window a patch, tokens are not those of the layout, or for an
        unknown kernel or 64-bit inputs to it.
    """
    if query.shape[-3] != layout.num_tokens or windows.shape[-2:] != (layout.num_patches, 4):
        raise ValueError(
            f"{query.shape[-3]} tokens and windows {windows.shape}, but {layout} has "
            f"{layout.num_tokens} tokens: expected windows [..., {layout.num_patches}, 4]"
        )
    batch = query.shape[:-3]
    windows = jnp.broadcast_to(jnp.asarray(windows, jnp.int32), (*batch, layout.num_patches, 4))
    images = [a.reshape(-1, *a.shape[len(batch) :]) for a in (query, key, value, windows)]

    if kernel is not None:
        return _in_tiles(kernel, layout, *images).reshape(query.shape)

    def sparse(*images: Array) -> Array:
        return lax.map(lambda one: _attend(layout, *one), images)

    dense = functools.partial(_masked, layout)
    output = lax.platform_dependent(*images, cpu=sparse, default=dense)
    return output.reshape(query.shape)


def _masked(layout: TokenLayout, query: Array, key: Array, value: Array, windows: Array) -> Array:
    mask = jnp.expand_dims(window_mask(windows, layout), -3)
    return fused_attention(query, key, value, mask)


def _in_tiles(kernel: str, layout: TokenLayout, *images: Array) -> Array:
    from vit_interact.models import pallas_boxes, pallas_windows

    if kernel != "pallas":
        raise ValueError(f"kernel={kernel!r}: expected None or 'pallas'")
    if any(array.dtype == jnp.float64 for array in images):
        raise ValueError("Pallas kernels compute in float32, not in float64: kernel=None")
    # Chosen when a program is lowered, so that it can be exported for other machines.
    fits = pallas_boxes.suitable_tiles(layout, images[0].dtype) is not None
    return lax.platform_dependent(
        *images,
        cpu=functools.partial(pallas_windows.attend, layout, True),
        tpu=functools.partial(pallas_windows.attend, layout, False),
        default=functools.partial(pallas_boxes.attend if fits else _masked, layout),
    )


class _Side(NamedTuple):
    """Queries or keys and values of one image: prefix tokens `[H, T, K]`, blocks of patches."""

    prefix: Array
    blocks: Array  # [blocks, H, S, K]


def _split(tokens: Float[Array, "N H K"], layout: TokenLayout) -> _Side:
    prefix, patches = jnp.split(tokens, [layout.prefix])
    by_block = patches[patch_blocks(layout).patches]
    return _Side(jnp.swapaxes(prefix, 0, 1), jnp.swapaxes(by_block, 1, 2))


def _unite(side: _Side, layout: TokenLayout) -> Float[Array, "N H K"]:
    """The tokens of `_split`, in their order."""
    blocks = patch_blocks(layout)
    where = np.flatnonzero(blocks.real.reshape(-1))
    where = where[np.argsort(blocks.patches.reshape(-1)[where])]
    by_block = jnp.swapaxes(side.blocks, 1, 2)
    patches = by_block.reshape(-1, *by_block.shape[2:])[where]
    return jnp.concatenate([jnp.swapaxes(side.prefix, 0, 1), patches])


class _Lists(NamedTuple):
    """Which keys each block of queries needs.

    Attributes:
      windows: of the queries, `[blocks, S, 4]`.
      keys: needed blocks first `[blocks, room]`, filled up to whole steps.
      needed: how many of them are.
    """

    windows: Array
    keys: Array
    needed: Array


def _lists(windows: Int[Array, "P 4"], layout: TokenLayout) -> _Lists:
    blocks = patch_blocks(layout)
    needed = needed_blocks(windows, layout)
    first = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
    room = -len(blocks.patches) % _span(layout)
    return _Lists(
        windows[blocks.patches],
        jnp.pad(first, [(0, 0), (0, room)]),
        needed.sum(axis=-1, dtype=jnp.int32),
    )


def _step_keys(
    step: Array, lists: _Lists, layout: TokenLayout
) -> tuple[Array, Bool[Array, "S keys"]]:
    """Numbers of the blocks of keys of one step, and which keys each query may attend to."""
    blocks = patch_blocks(layout)
    span = _span(layout)
    numbers = lax.dynamic_slice_in_dim(lists.keys, step * span, span)
    listed = step * span + np.arange(span) < lists.needed
    position = layout.positions()[blocks.patches]
    real = (jnp.asarray(blocks.real)[numbers] & listed[:, None]).reshape(-1)
    row, col = jnp.moveaxis(jnp.asarray(position)[numbers].reshape(-1, 2), -1, 0)
    top, left, bottom, right = jnp.moveaxis(lists.windows, -1, 0)[..., None]
    return numbers, (top <= row) & (row < bottom) & (left <= col) & (col < right) & real


def _picked(blocks: Float[Array, "blocks H S K"], numbers: Array) -> Float[Array, "H keys K"]:
    """Some blocks side by side."""
    picked = jnp.swapaxes(blocks[numbers], 0, 1)
    return picked.reshape(picked.shape[0], -1, picked.shape[-1])


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _masked_logits(q: Array, k: Array, mask: Array | bool) -> Array:
    logits = _dot("hik,hjk->hij", q, k)
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    layout: TokenLayout, query: Array, key: Array, value: Array, windows: Array
) -> Float[Array, "N H K"]:
    """`window_attention` of one image."""
    return _forward(layout, query, key, value, windows)[0]


def _forward(
    layout: TokenLayout, query: Array, key: Array, value: Array, windows: Array
) -> tuple[Array, Array]:
    """The output, and the logarithm of the sum of exponentials of the patches `[blocks, H, S]`."""
    q, k, v = (_split(tokens, layout) for tokens in (query, key, value))
    span = _span(layout)

    def of_block(arguments: tuple[Array, _Lists]) -> tuple[Array, Array]:
        queries, lists = arguments

        def add(keys: Array, values: Array, mask: Any, state: tuple[Array, ...]) -> Any:
            largest, total, output = state
            logits = _masked_logits(queries, keys, mask)
            above = jnp.maximum(largest, logits.max(axis=-1))
            weights = jnp.exp(logits - above[..., None])
            shrink = jnp.exp(largest - above)
            added = _dot("hij,hjk->hik", weights.astype(values.dtype), values)
            return (
                above,
                total * shrink + weights.sum(axis=-1),
                output * shrink[..., None] + added,
            )

        def step(number: Array, state: tuple[Array, ...]) -> Any:
            numbers, mask = _step_keys(number, lists, layout)
            return add(_picked(k.blocks, numbers), _picked(v.blocks, numbers), mask, state)

        output = jnp.zeros_like(queries, dtype=jnp.promote_types(queries.dtype, jnp.float32))
        state = (output[..., 0] + _LOWEST, output[..., 0], output)
        if layout.prefix:
            state = add(k.prefix, v.prefix, True, state)
        steps = (lists.needed + span - 1) // span
        largest, total, output = lax.fori_loop(0, steps, step, state)
        total = jnp.where(total > 0, total, 1)  # fillings may see nothing
        return (output / total[..., None]).astype(value.dtype), largest + jnp.log(total)

    patches, log_total = lax.map(of_block, (q.blocks, _lists(windows, layout)))
    prefix = jnp.swapaxes(explicit_attention(query[: layout.prefix], key, value).output, 0, 1)
    return _unite(_Side(prefix, patches), layout), log_total


def _attend_fwd(
    layout: TokenLayout, query: Array, key: Array, value: Array, windows: Array
) -> tuple[Array, tuple[Array, ...]]:
    output, log_total = _forward(layout, query, key, value, windows)
    return output, (query, key, value, windows, output, log_total)


def _attend_bwd(layout: TokenLayout, kept: tuple[Array, ...], grad: Array) -> tuple[Any, ...]:
    query, key, value, windows, output, log_total = kept
    q, k, v, g = (_split(tokens, layout) for tokens in (query, key, value, grad))
    span = _span(layout)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    along = jnp.sum(output.astype(wide) * grad.astype(wide), axis=-1, keepdims=True)
    along = _split(along, layout).blocks[..., 0]  # [blocks, H, S]
    # Fillings are copies of patch 0: their gradients are none of its.
    real = jnp.asarray(patch_blocks(layout).real)[:, None, :, None]
    g = g._replace(blocks=jnp.where(real, g.blocks, 0))
    along = jnp.where(real[..., 0], along, 0)

    def of_block(sides: Any, arguments: tuple[Any, ...]) -> tuple[Any, Array]:
        queries, grads, logs, mean, lists = arguments

        def through(keys: Array, values: Array, mask: Any) -> tuple[Array, Array, Array]:
            """Derivatives by the queries, these keys and these values."""
            weights = jnp.exp(_masked_logits(queries, keys, mask) - logs[..., None])
            slope = weights * (_dot("hik,hjk->hij", grads, values) - mean[..., None])
            slope, weights = slope.astype(queries.dtype), weights.astype(queries.dtype)
            return (
                _dot("hij,hjk->hik", slope, keys),
                _dot("hij,hik->hjk", slope, queries),
                _dot("hij,hik->hjk", weights, grads),
            )

        def step(number: Array, state: Any) -> Any:
            of_query, of_keys, of_values = state
            numbers, mask = _step_keys(number, lists, layout)
            keys, values = _picked(k.blocks, numbers), _picked(v.blocks, numbers)
            to_query, to_keys, to_values = through(keys, values, mask)
            return (
                of_query + to_query,
                _add(of_keys, numbers, to_keys),
                _add(of_values, numbers, to_values),
            )

        of_query = jnp.zeros_like(queries, dtype=wide)
        of_keys, of_values = sides
        if layout.prefix:
            of_query, to_keys, to_values = through(k.prefix, v.prefix, True)
            of_keys = of_keys._replace(prefix=of_keys.prefix + to_keys)
            of_values = of_values._replace(prefix=of_values.prefix + to_values)
        steps = (lists.needed + span - 1) // span
        of_query, key_blocks, value_blocks = lax.fori_loop(
            0, steps, step, (of_query, of_keys.blocks, of_values.blocks)
        )
        sides = of_keys._replace(blocks=key_blocks), of_values._replace(blocks=value_blocks)
        return sides, of_query

    zeros = jax.tree.map(lambda array: jnp.zeros_like(array, dtype=wide), (k, v))
    inputs = (q.blocks, g.blocks, log_total, along, _lists(windows, layout))
    (of_keys, of_values), of_queries = lax.scan(of_block, zeros, inputs)

    prefix = layout.prefix
    _, pull = jax.vjp(lambda *a: explicit_attention(*a).output, query[:prefix], key, value)
    by_prefix = pull(grad[:prefix])
    none = _Side(jnp.swapaxes(by_prefix[0], 0, 1).astype(wide), of_queries)
    by_query = _unite(none, layout)
    by_key, by_value = (_unite(side, layout) for side in (of_keys, of_values))
    return (
        by_query.astype(query.dtype),
        (by_key + by_prefix[1]).astype(key.dtype),
        (by_value + by_prefix[2]).astype(value.dtype),
        None,
    )


def _add(
    blocks: Float[Array, "blocks H S K"], numbers: Array, added: Float[Array, "H keys K"]
) -> Array:
    """Adds to some blocks, one after the other: numbers that only fill up may repeat."""
    size = blocks.shape[2]
    for place in range(len(numbers)):
        one = lax.dynamic_index_in_dim(blocks, numbers[place], keepdims=False)
        one = one + added[:, place * size : (place + 1) * size]
        blocks = lax.dynamic_update_index_in_dim(blocks, one, numbers[place], 0)
    return blocks


_attend.defvjp(_attend_fwd, _attend_bwd)
