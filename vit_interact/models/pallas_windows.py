"""Pallas kernels for TPUs: attention within windows that skips blocks of keys.

Tokens are put into blocks: the prefix tokens, which see and are seen by all, then stretches of a
Hilbert curve through the patches. For each block of queries the blocks of keys that its windows
reach are listed; a program loops over its list with a running softmax (Milakov & Gimelshein 2018,
as in FlashAttention). Backward, one kernel goes through the same lists for the queries, another
through the lists the other way round for keys and values. Weights exist for a block by a block.

`models/window_attention.py` is the way in; on a CPU, Pallas' interpreter runs this, for tests. A
GPU has kernels of its own (`models/pallas_boxes.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from vit_interact.layout import TokenLayout
from vit_interact.models.pallas_tpu import call
from vit_interact.models.patch_blocks import needed_blocks, patch_blocks
from vit_interact.models.tile_maps import LOWEST, dot, pad_width

LOG, ALONG = range(2)
"""Of each query: logarithm of the sum of exponentials; its output times that one's gradient."""

SIZE = 128
"""Tokens in a block; lanes of a TPU."""

# Places of keys. Prefix tokens are in every window, filling is in none, not even the prefix's own.
_EVERYWHERE, _NOWHERE, _BEYOND = -2.0, 1e6, 1e5


class _Plan(NamedTuple):
    """Who attends to whom, by block; the first block holds the prefix tokens.

    Attributes:
      keys: blocks of keys that each block of queries needs come first, `[B, blocks, blocks]`.
      keys_needed: how many do, `[B, blocks]`.
      queries: blocks of queries that need each block of keys come first, `[B, blocks, blocks]`.
      queries_needed: how many do, `[B, blocks]`.
      windows: (top, left, bottom, right) of each query, `[B, queries, 4]`, float32.
      places: row and column of each key `[keys, 2]`, float32.
    """

    keys: Array
    keys_needed: Array
    queries: Array
    queries_needed: Array
    windows: Array
    places: Array


def computed_share(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"],
    layout: TokenLayout,
    size: int = SIZE,
) -> Float[Array, "*batch"]:
    """As `window_attention.computed_share`, with blocks of `size` tokens and steps of one."""
    needed = _with_prefix(needed_blocks(windows, layout, size), layout)
    return needed.sum(axis=(-1, -2)) * size**2 / layout.num_tokens**2


def attend(
    layout: TokenLayout,
    interpret: bool,
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    windows: Int[Array, "B P 4"],
    size: int = SIZE,
) -> Float[Array, "B N H K"]:
    """Attention within windows, once differentiable, in blocks of `size` tokens."""
    return _attend(layout, size, interpret, query, key, value, windows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    layout: TokenLayout,
    size: int,
    interpret: bool,
    query: Array,
    key: Array,
    value: Array,
    windows: Array,
) -> Array:
    return _attend_fwd(layout, size, interpret, query, key, value, windows)[0]


def _attend_fwd(
    layout: TokenLayout, size: int, interpret: bool, *arrays: Array
) -> tuple[Array, tuple[Array, ...]]:
    query, key, value, windows = arrays
    q, k, v = (_arrange(x, layout, size) for x in (query, key, value))
    plan = _plan(windows, layout, size)
    output, log = _forward(size, interpret, plan, q, k, v)
    output = _restore(output, layout, size, query.shape[-1]).astype(value.dtype)
    return output, (*arrays, output, log)


def _attend_bwd(
    layout: TokenLayout, size: int, interpret: bool, kept: tuple[Array, ...], grad: Array
) -> tuple[Any, ...]:
    query, key, value, windows, output, log = kept
    q, k, v, g = (_arrange(x, layout, size) for x in (query, key, value, grad.astype(value.dtype)))
    along = jnp.sum(output.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1, keepdims=True)
    rows = jnp.concatenate([log, _arrange(along, layout, size)[..., :1]], axis=-1)
    plan = _plan(windows, layout, size)
    by_query = _by_queries(size, interpret, plan, q, k, v, g, rows)
    by_key, by_value = _by_keys(size, interpret, plan, q, k, v, g, rows)
    of = ((by_query, query), (by_key, key), (by_value, value))
    return *(_restore(x, layout, size, a.shape[-1]).astype(a.dtype) for x, a in of), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _plan(windows: Int[Array, "B P 4"], layout: TokenLayout, size: int) -> _Plan:
    blocks = patch_blocks(layout, size)
    needed = _with_prefix(needed_blocks(windows, layout, size), layout)

    def lists(needed: Array) -> tuple[Array, Array]:
        first = jnp.argsort(~needed, axis=-1, stable=True)
        return first.astype(jnp.int32), needed.sum(axis=-1, dtype=jnp.int32)

    places = layout.positions()[blocks.patches].astype(np.float32)
    places[~blocks.real] = _NOWHERE
    places = places.reshape(-1, 2)
    corners = windows[..., blocks.patches.reshape(-1), :].astype(jnp.float32)
    if layout.prefix:
        prefix = np.full((size, 2), _NOWHERE, np.float32)
        prefix[: layout.prefix] = _EVERYWHERE
        places = np.concatenate([prefix, places])
        whole = np.array([-_BEYOND, -_BEYOND, _BEYOND, _BEYOND], np.float32)
        of_prefix = jnp.broadcast_to(whole, (*corners.shape[:-2], size, 4))
        corners = jnp.concatenate([of_prefix, corners], axis=-2)
    return _Plan(*lists(needed), *lists(jnp.swapaxes(needed, -1, -2)), corners, jnp.asarray(places))


def _with_prefix(needed: Array, layout: TokenLayout) -> Bool[Array, "*batch blocks blocks"]:
    """All need the block of prefix tokens, and it needs all; without any there is no such block."""
    if not layout.prefix:
        return needed
    border = [(0, 0)] * (needed.ndim - 2) + [(1, 0)] * 2
    return jnp.pad(needed, border, constant_values=True)


def _arrange(tokens: Float[Array, "B N H K"], layout: TokenLayout, size: int) -> Array:
    """Tokens in blocks `[B, H, blocks * size, K']`; what fills blocks and width up is 0."""
    prefix, patches = jnp.split(tokens, [layout.prefix], axis=1)
    blocks = patch_blocks(layout, size)
    patches = patches[:, blocks.patches.reshape(-1)]
    patches = jnp.where(blocks.real.reshape(-1, 1, 1), patches, 0)
    if layout.prefix:
        prefix = jnp.pad(prefix, [(0, 0), (0, size - layout.prefix), (0, 0), (0, 0)])
        patches = jnp.concatenate([prefix, patches], axis=1)
    return pad_width(jnp.swapaxes(patches, 1, 2))


def _restore(
    arranged: Float[Array, "B H M W"], layout: TokenLayout, size: int, width: int
) -> Float[Array, "B N H K"]:
    """The tokens of `_arrange`, in their order."""
    blocks = patch_blocks(layout, size)
    first = size if layout.prefix else 0
    where = np.flatnonzero(blocks.real.reshape(-1))
    where = where[np.argsort(blocks.patches.reshape(-1)[where])]
    where = np.concatenate([np.arange(layout.prefix), first + where])
    return jnp.swapaxes(arranged[:, :, where, :width], 1, 2)


class _Specs(NamedTuple):
    """How programs `(image, head, block)` see arrays: their own block, or all of an image."""

    size: int
    interpret: bool

    def own(self, columns: int) -> pl.BlockSpec:
        """A block of `[B, H, tokens, columns]`."""
        return pl.BlockSpec((None, None, self.size, columns), lambda b, h, i: (b, h, i, 0))

    def all(self, array: Array) -> pl.BlockSpec:
        """All of `[B, H, ...]`."""
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda b, h, i: (b, h, 0, 0))

    def scalars(self, array: Array) -> pl.BlockSpec:
        """All of `[B, 1, ...]`, where a TPU can branch on them."""
        more: Any = {}
        if not self.interpret:
            from jax.experimental.pallas import tpu

            more = {"memory_space": tpu.SMEM}
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, h, i: (b, 0, 0), **more)

    def of_queries(self, plan: _Plan) -> tuple[list[pl.BlockSpec], list[Array]]:
        """What a program for a block of queries sees of a plan, and the arrays."""
        needed, places = plan.keys_needed[:, None], plan.places.T
        windows = pl.BlockSpec((None, self.size, 4), lambda b, h, i: (b, i, 0))
        everywhere = pl.BlockSpec(places.shape, lambda b, h, i: (0, 0))
        specs = [self.scalars(plan.keys), self.scalars(needed), windows, everywhere]
        return specs, [plan.keys, needed, plan.windows, places]


def _forward(
    size: int, interpret: bool, plan: _Plan, q: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    """The output `[B, H, M, K']` and its `LOG` `[B, H, M, 1]`, float32."""
    specs, (*lead, tokens, width) = _Specs(size, interpret), q.shape
    plan_specs, plan_arrays = specs.of_queries(plan)
    return call(
        functools.partial(_forward_kernel, size),
        interpret,
        "vit_interact_windows",
        grid=(*lead, tokens // size),
        in_specs=[*plan_specs, specs.own(width), specs.all(k), specs.all(v)],
        out_specs=[specs.own(width), specs.own(1)],
        out_shape=[jax.ShapeDtypeStruct((*lead, tokens, c), jnp.float32) for c in (width, 1)],
    )(*plan_arrays, q, k, v)


def _forward_kernel(
    size: int, lists: Any, needed: Any, windows: Any, places: Any, q_ref: Any, k_ref: Any,
    v_ref: Any, output_ref: Any, log_ref: Any,
) -> None:  # fmt: skip
    block, query = pl.program_id(2), q_ref[...]
    corners = [windows[:, pl.ds(side, 1)] for side in range(4)]

    def step(n: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, output = carry
        keys = _part(lists[block, n], size)
        inside = _inside(corners, [places[pl.ds(axis, 1), keys] for axis in range(2)])
        logits = jnp.where(inside, dot(query, k_ref[keys, :]), LOWEST)
        new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.where(inside, jnp.exp(logits - new), 0.0)
        shrink = jnp.exp(top - new)
        value = v_ref[keys, :]
        added = dot(weights.astype(value.dtype), value, transposed=False)
        total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
        return new, total, output * shrink + added

    column = jnp.zeros((size, 1), jnp.float32)
    start = (column + LOWEST, column, jnp.zeros(output_ref.shape, jnp.float32))
    top, total, output = lax.fori_loop(0, needed[0, block], step, start)
    total = jnp.where(total > 0.0, total, 1.0)  # filling may see nothing
    output_ref[...] = output / total
    log_ref[...] = top + jnp.log(total)


def _by_queries(
    size: int, interpret: bool, plan: _Plan, q: Array, k: Array, v: Array, g: Array, rows: Array
) -> Array:
    specs, (*lead, tokens, width) = _Specs(size, interpret), q.shape
    plan_specs, plan_arrays = specs.of_queries(plan)
    return call(
        functools.partial(_queries_kernel, size),
        interpret,
        "vit_interact_windows_queries",
        grid=(*lead, tokens // size),
        in_specs=[
            *plan_specs, specs.own(width), specs.own(width), specs.own(2), specs.all(k),
            specs.all(v),
        ],
        out_specs=specs.own(width),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
    )(*plan_arrays, q, g, rows, k, v)  # fmt: skip


def _queries_kernel(
    size: int, lists: Any, needed: Any, windows: Any, places: Any, q_ref: Any, g_ref: Any,
    rows_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any,
) -> None:  # fmt: skip
    block, query, grad = pl.program_id(2), q_ref[...], g_ref[...]
    corners = [windows[:, pl.ds(side, 1)] for side in range(4)]
    log, along = (rows_ref[:, pl.ds(column, 1)] for column in (LOG, ALONG))

    def step(n: Any, total: Array) -> Array:
        keys = _part(lists[block, n], size)
        inside = _inside(corners, [places[pl.ds(axis, 1), keys] for axis in range(2)])
        key = k_ref[keys, :]
        weights = jnp.where(inside, jnp.exp(dot(query, key) - log), 0.0)
        slope = weights * (dot(grad, v_ref[keys, :]) - along)
        return total + dot(slope.astype(key.dtype), key, transposed=False)

    zeros = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = lax.fori_loop(0, needed[0, block], step, zeros)


def _by_keys(
    size: int, interpret: bool, plan: _Plan, q: Array, k: Array, v: Array, g: Array, rows: Array
) -> tuple[Array, Array]:
    specs, (*lead, tokens, width) = _Specs(size, interpret), q.shape
    needed = plan.queries_needed[:, None]
    # Transposed tiles: what belongs to queries lies along them.
    windows, rows = jnp.swapaxes(plan.windows, 1, 2), jnp.swapaxes(rows, 2, 3)
    return call(
        functools.partial(_keys_kernel, size),
        interpret,
        "vit_interact_windows_keys",
        grid=(*lead, tokens // size),
        in_specs=[
            specs.scalars(plan.queries), specs.scalars(needed),
            pl.BlockSpec((None, *windows.shape[1:]), lambda b, h, i: (b, 0, 0)),
            pl.BlockSpec((size, 2), lambda b, h, i: (i, 0)),
            specs.all(q), specs.all(g), specs.all(rows), specs.own(width), specs.own(width),
        ],
        out_specs=[specs.own(width)] * 2,
        out_shape=[jax.ShapeDtypeStruct(k.shape, jnp.float32)] * 2,
    )(plan.queries, needed, windows, plan.places, q, g, rows, k, v)  # fmt: skip


def _keys_kernel(
    size: int, lists: Any, needed: Any, windows: Any, places: Any, q_ref: Any, g_ref: Any,
    rows_ref: Any, k_ref: Any, v_ref: Any, key_ref: Any, value_ref: Any,
) -> None:  # fmt: skip
    block, key, value = pl.program_id(2), k_ref[...], v_ref[...]
    place = [places[:, pl.ds(axis, 1)] for axis in range(2)]

    def step(n: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        of_key, of_value = carry
        queries = _part(lists[block, n], size)
        inside = _inside([windows[pl.ds(side, 1), queries] for side in range(4)], place)
        query, grad = q_ref[queries, :], g_ref[queries, :]
        log, along = (rows_ref[pl.ds(row, 1), queries] for row in (LOG, ALONG))
        weights = jnp.where(inside, jnp.exp(dot(key, query) - log), 0.0)
        slope = weights * (dot(value, grad) - along)
        return (
            of_key + dot(slope.astype(query.dtype), query, transposed=False),
            of_value + dot(weights.astype(grad.dtype), grad, transposed=False),
        )

    zeros = jnp.zeros(key_ref.shape, jnp.float32)
    of_key, of_value = lax.fori_loop(0, needed[0, block], step, (zeros, zeros))
    key_ref[...], value_ref[...] = of_key, of_value


def _part(block: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(block * size, size), size)


def _inside(corners: list[Array], place: list[Array]) -> Array:
    """Where a key lies in a query's window; one of them a column, the other a row."""
    (top, left, bottom, right), (row, col) = corners, place
    within = (top <= row) & (row < bottom) & (left <= col) & (col < right)
    return within | (row == _EVERYWHERE)
