"""Pallas kernels for NVIDIA's GPUs, through Triton: attention, row statistics and maps.

Arrays stay `[B, N, H, K]` as the model has them, and nothing is filled up: the last of several
tiles starts early enough to be full, so that what two tiles share is written twice. Weights exist
for one tile of queries and keys of one head at a time, in registers. `models/tiled.py` is the way
in; docs/kernels.md has the sizes that were tried.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from vit_interact.models.gpu import has_triton
from vit_interact.models.tile_maps import (
    LOG,
    LOG2_E,
    LOWEST,
    REST,
    WHICH,
    MapSides,
    Tile,
    dot,
    halves,
    pad_to,
    pad_width,
    whole_tile,
)

_SMALLEST = 16  # sides of a product, of what a tensor core takes


class Sizes(NamedTuple):
    """A tile's queries and keys, and how Triton is to compile."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 3


def attend(
    query: Float[Array, "B M H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    tile: tuple[int, int] | None,
    interpret: bool,
) -> tuple[Float[Array, "B M H K"], Float[Array, "B H M 1"]]:
    """Heads' outputs in the values' type, and `LOG` of each row."""
    sizes = Sizes(32, 64, 8, 2) if _exact(query) else Sizes(128 if key.shape[1] > 1023 else 64, 64)
    return _by_rows(
        _attend_kernel, "attend", sizes, tile, interpret, value.dtype, query, key, value
    )


def cut_rows(
    query: Float[Array, "B M H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    tile: tuple[int, int] | None,
    interpret: bool,
) -> tuple[Float[Array, "B M H K"], Float[Array, "B H M 3"]]:
    """Values of each row's other keys weighted by `exp(logit - largest)`; columns of the rows."""
    sizes = Sizes(32, 64, 8, 2) if _exact(query) else Sizes(64, 64)
    return _by_rows(_rows_kernel, "rows", sizes, tile, interpret, jnp.float32, query, key, value)


def stacked_maps(
    name: str, layers: Sequence[MapSides], tile: tuple[int, int] | None, interpret: bool
) -> Float[Array, "L B M N"]:
    """The map of an indicator of several layers; arrays of `layers` as the model has them.

    Each is written where it belongs: a copy takes as long as a map.
    """
    stack = None
    for layer, sides in enumerate(layers):
        stack = _write_map(name, sides, tile, interpret, stack, layer, len(layers))
    assert stack is not None
    return stack[:, :, : layers[0].query.shape[1], : layers[0].key.shape[1]]


def _write_map(
    name: str,
    sides: MapSides,
    tile: tuple[int, int] | None,
    interpret: bool,
    stack: Array | None,
    layer: int,
    count: int,
) -> Array:
    """Writes one map into the stack, or into a new one that holds nothing else yet."""
    if _exact(sides.query):
        sizes = Sizes(64, 128, 8, 2)
    else:
        sizes = Sizes(64, 128) if sides.left is None else Sizes(64, 64)
    sides = sides.map(query=_fill, key=_fill, left=_fill, value=_fill)
    sides = sides.map(rows=_fill_rows, ends=_fill_rows, own=lambda own: pad_to(own, -1, _SMALLEST))
    batch, queries = sides.query.shape[:2]
    keys = sides.key.shape[1]
    sizes = _fitting(sizes, tile, queries, keys)
    given = {field: array for field, array in sides._asdict().items() if array is not None}
    if sides.left is not None:
        parts = halves(given.pop("left"), sides.value.dtype)
        given |= {f"left{number}": part for number, part in enumerate(parts)}
    place = pl.BlockSpec((None, None, queries, keys), lambda b, i, j: (layer, b, 0, 0))
    before = [] if stack is None else [stack]
    return call(
        functools.partial(_map_kernel, name, tuple(given), sizes, interpret),
        sizes,
        name,
        interpret,
        grid=(batch, pl.cdiv(queries, sizes.queries), pl.cdiv(keys, sizes.keys)),
        in_specs=[*(of_image(array) for array in given.values()), *(place for _ in before)],
        out_specs=place,
        out_shape=jax.ShapeDtypeStruct((count, batch, queries, keys), jnp.float32),
        input_output_aliases={len(given): 0} if before else {},
    )(*given.values(), *before)


def _exact(query: Array) -> bool:
    """Whether products are of float32, and so in full float32: not on tensor cores, and slow."""
    return query.dtype == jnp.float32


def _fitting(sizes: Sizes, tile: tuple[int, int] | None, queries: int, keys: int) -> Sizes:
    """A tile that is no larger than the map."""
    sides = tile or (sizes.queries, sizes.keys)
    most = (1 << (count.bit_length() - 1) for count in (queries, keys))
    return sizes._replace(queries=min(sides[0], next(most)), keys=min(sides[1], next(most)))


def _fill(array: Float[Array, "B N H K"]) -> Array:
    """Widths and numbers of tokens that a product takes; zeros add nothing to logits."""
    return pad_width(pad_to(array, 1, _SMALLEST) if array.shape[1] < _SMALLEST else array)


def _fill_rows(rows: Float[Array, "B H M C"]) -> Array:
    return pad_to(rows, 2, _SMALLEST) if rows.shape[2] < _SMALLEST else rows


def of_image(array: Array) -> pl.BlockSpec:
    """All of an image's `[B, ...]`."""
    return pl.BlockSpec((None, *array.shape[1:]), lambda b, *_: (b, *(0,) * (array.ndim - 1)))


def call(kernel: Any, sizes: Sizes, name: str, interpret: bool, **arguments: Any) -> Any:
    """`pl.pallas_call` through Triton, or by Pallas' interpreter."""
    name = f"vit_interact_{name}"
    if interpret:
        return pl.pallas_call(kernel, name=name, interpret=True, **arguments)
    if not has_triton():
        # Programs are traced for all platforms, so that must not stop a TPU; on a GPU, jax then
        # says what it cannot lower.
        return pl.pallas_call(kernel, name=name, **arguments)
    from jax.experimental.pallas import triton

    how = triton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages)
    return pl.pallas_call(kernel, name=name, compiler_params=how, **arguments)


def exp2(interpret: bool, x: Array) -> Array:
    """2 to the power of `x` in one instruction; what underflows is 0."""
    if interpret:
        return jnp.exp2(x)
    from jax.experimental.pallas import triton

    (found,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return found


def _by_rows(
    kernel: Any,
    name: str,
    sizes: Sizes,
    tile: tuple[int, int] | None,
    interpret: bool,
    dtype: Any,
    *arrays: Array,
) -> tuple[Array, Array]:
    """Calls a kernel for each block of queries of each head: an array like them, and columns."""
    rows, width = arrays[0].shape[1], arrays[0].shape[3]
    tokens = arrays[1].shape[1]
    query, key, value = (_fill(array) for array in arrays)
    batch, queries, heads, wide = query.shape
    sizes = _fitting(sizes, tile, queries, key.shape[1])
    columns = 1 if kernel is _attend_kernel else 3

    def of_head(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, count, None, wide), lambda b, h, i: (b, 0, h, 0))

    found, statistics = call(
        functools.partial(kernel, tokens, sizes, functools.partial(exp2, interpret)),
        sizes,
        name,
        interpret,
        grid=(batch, heads, pl.cdiv(queries, sizes.queries)),
        in_specs=[of_head(x.shape[1]) for x in (query, key, value)],
        out_specs=[
            of_head(queries),
            pl.BlockSpec((None, None, queries, columns), lambda b, h, i: (b, h, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, queries, columns), jnp.float32),
        ],
    )(query, key, value)
    return found[:, :rows, :, :width], statistics[:, :, :rows]


def stretch(program: Any, size: int, length: int) -> Any:
    """The places of a tile; the last one ends where the array does."""
    return pl.ds(jnp.minimum(program * size, length - size), size)


def _over_keys(tokens: int, length: int, shape: tuple[int, int], step: Any, carry: Any) -> Any:
    """`step(start, numbers, known, carry)` for tiles of keys.

    `numbers` counts the keys of a tile; `known` is where it has only keys of its own, None for all.
    """
    size = shape[1]
    numbers = lax.broadcasted_iota(jnp.int32, shape, 1)
    full, left = divmod(tokens, size)
    carry = lax.fori_loop(0, full, lambda i, c: step(i * size, numbers + i * size, None, c), carry)
    if not left:
        return carry
    start = max(0, min(length, tokens) - size)
    here = numbers + start
    return step(start, here, (here >= full * size) & (here < tokens), carry)


def _attend_kernel(
    tokens: int, sizes: Sizes, exp2: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any,
    rows_ref: Any,
) -> None:  # fmt: skip
    own = stretch(pl.program_id(2), sizes.queries, q_ref.shape[0])
    query = q_ref[own, :]

    def step(start: Any, numbers: Array, known: Array | None, carry: Any) -> Any:
        keys = pl.ds(start, sizes.keys)
        logits = dot(query, k_ref[keys, :])
        if known is not None:
            logits = jnp.where(known, logits, LOWEST)
        return add_keys(exp2, logits, v_ref[keys, :], carry)

    column = jnp.zeros((sizes.queries, 1), jnp.float32)
    start = column + LOWEST, column, jnp.zeros(query.shape, jnp.float32)
    shape = (sizes.queries, sizes.keys)
    top, total, output = _over_keys(tokens, k_ref.shape[0], shape, step, start)
    out_ref[own, :] = (output / total).astype(out_ref.dtype)
    rows_ref[own, :] = top + jnp.log2(total)


def add_keys(exp2: Any, logits: Array, value: Array, carry: tuple[Array, ...]) -> Any:
    """A step of a running softmax in powers of two: largest logit, sum and output of the rows."""
    top, total, output = carry
    new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True) * LOG2_E)
    weights = exp2(logits * LOG2_E - new)
    shrink = exp2(top - new)
    added = dot(weights.astype(value.dtype), value, transposed=False)
    total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
    return new, total, output * shrink + added


def _rows_kernel(
    tokens: int, sizes: Sizes, exp2: Any, q_ref: Any, k_ref: Any, v_ref: Any, rest_ref: Any,
    rows_ref: Any,
) -> None:  # fmt: skip
    own = stretch(pl.program_id(2), sizes.queries, q_ref.shape[0])
    query, shape = q_ref[own, :], (sizes.queries, sizes.keys)

    def largest(start: Any, numbers: Array, known: Array | None, carry: Any) -> Any:
        top, which = carry
        logits = dot(query, k_ref[pl.ds(start, sizes.keys), :])
        if known is not None:
            logits = jnp.where(known, logits, LOWEST)
        here = jnp.max(logits, axis=1, keepdims=True)
        # Any of several largest ones will do: the others hold at most a half each, too.
        number = jnp.max(jnp.where(logits == here, numbers, -1), axis=1, keepdims=True)
        return jnp.maximum(top, here), jnp.where(here > top, number, which)

    column = jnp.zeros((sizes.queries, 1), jnp.float32)
    length = k_ref.shape[0]
    start = column + LOWEST, column.astype(jnp.int32)
    top, which = _over_keys(tokens, length, shape, largest, start)
    top = top * LOG2_E

    def add(start: Any, numbers: Array, known: Array | None, carry: Any) -> Any:
        rest, output = carry
        keys = pl.ds(start, sizes.keys)
        weights = exp2(dot(query, k_ref[keys, :]) * LOG2_E - top)
        # Left out, not subtracted: what is left of a row next to 1 may be 1e-9.
        others = numbers != which
        weights = jnp.where(others if known is None else others & known, weights, 0.0)
        value = v_ref[keys, :]
        for part in halves(weights, value.dtype, in_kernel=True):
            output = output + dot(part, value, transposed=False)
        return rest + jnp.sum(weights, axis=1, keepdims=True), output

    start = column, jnp.zeros(query.shape, jnp.float32)
    rest, output = _over_keys(tokens, length, shape, add, start)
    rest_ref[own, :] = output
    columns = {LOG: top + jnp.log2(1.0 + rest), WHICH: which.astype(jnp.float32), REST: rest}
    for number, values in columns.items():
        rows_ref[own, pl.ds(number, 1)] = values


def _map_kernel(
    name: str, fields: tuple[str, ...], sizes: Sizes, interpret: bool, *refs: Any
) -> None:
    sides, out_ref = dict(zip(fields, refs, strict=False)), refs[-1]
    queries, tokens = out_ref.shape
    own = stretch(pl.program_id(1), sizes.queries, queries)
    keys = stretch(pl.program_id(2), sizes.keys, tokens)
    numbers = lax.broadcasted_iota(jnp.int32, (sizes.queries, sizes.keys), 1) + keys.start

    def product(left: str, right: str, h: Any) -> Array:
        return dot(sides[left][own, h, :], sides[right][keys, h, :])

    def cross(h: Any) -> Array:
        parts = [product(field, "value", h) for field in fields if field.startswith("left")]
        return functools.reduce(jnp.add, parts)

    tile = Tile(
        numbers,
        functools.partial(exp2, interpret),
        logits=lambda h: product("query", "key", h),
        # One axis is loaded and the other put beside it: Triton loads `[M, 1]` as `[M, N]`, each
        # number as often as it is needed, which took longer than all the rest.
        rows=lambda h, column: sides["rows"][h, own, column][:, None],
        ends=lambda h, column: sides["ends"][h, own, column][:, None],
        cross=cross,
        own=lambda h: sides["own"][h, 0, keys][None, :],
    )
    out_ref[own, keys] = whole_tile(name, sides["query"].shape[1], tile)
