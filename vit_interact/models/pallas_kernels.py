"""Pallas kernels for GPU and TPU: attention's row statistics, and indicators tile by tile.

Weights exist for one tile of queries and keys of one head at a time, in registers or on-chip
memory. Two kernels share the work:

* **Row statistics**: one program a block of queries of a head. A first loop over the keys finds
  each row's largest logit and the sum of the others beside it, a second one the output. A key with
  more than half of its row's attention is left out of that output and named instead, for the care
  that `interactions/by_head.py` takes of it (`cut_dominant`).
* **Maps**: one program a tile of the map. A loop over heads makes the tile's weights again from the
  statistics and adds up the indicator, so that `[B, N, N]` is all that is written.

One source serves both compilers, so it keeps to what both know: two-dimensional tiles whose sides
are powers of two, loops, slices of references and no slices of values. A row's statistics are
columns `[M, 1]`, which broadcast against a tile without a transposition. `models/tiled.py` is the
way in; this module is imported when it is first used, as Pallas takes a while to load.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from vit_interact.models.attend import Tiles

TOP, SCALE, WHICH, REST = range(4)
"""Columns of the row statistics: largest logit; 1 over the sum of `exp(logit - largest)`; number of
the key that holds more than half, or -1; attention of all other keys."""

OWN, DOMINANT = range(2)
"""Columns of a map's statistics: what a row adds to every edge; its value at the key `WHICH`."""

MASKED = -1e30  # Finite: inf - inf would be NaN.

OfHead = Callable[[Any], Any]


class Statistics(NamedTuple):
    """What is known of the rows of attention without holding them.

    Attributes:
      rest: `[B, H, M, K]`, output of the keys other than `WHICH`, float32.
      rows: `[B, H, M, 4]`, columns `TOP`, `SCALE`, `WHICH` and `REST`, float32.
    """

    rest: Array
    rows: Array


class QuerySide(NamedTuple):
    """What a map needs of its queries: arrays, or references to them in a kernel.

    Attributes:
      query: `[B, H, M, K]`, scaled.
      rows: `Statistics.rows`.
      left: `[B, H, M, K]`, multiplied with every value: `o M` of `leave_one_out`, or the gradient.
      ends: `[B, H, M, 2]`, columns `OWN` and `DOMINANT`.
    """

    query: Any
    rows: Any
    left: Any = None
    ends: Any = None


class KeySide(NamedTuple):
    """What a map needs of its keys: arrays, or references to them in a kernel.

    Attributes:
      key: `[B, H, N, K]`.
      value: `[B, H, N, K]`, float32.
      own: `[B, H, 1, N]`, what a key adds to every edge.
    """

    key: Any
    value: Any = None
    own: Any = None


def row_statistics(
    query: Float[Array, "B H M K"],
    key: Float[Array, "B H N K"],
    value: Float[Array, "B H N K"],
    tiles: Tiles,
) -> Statistics:
    """Statistics of each row of attention; `query` is scaled, `value` float32."""
    return Statistics(*_by_platform(_row_statistics, tiles, query, key, value))


def indicator_map(
    name: str, queries: QuerySide, keys: KeySide, tiles: Tiles
) -> Float[Array, "B M N"]:
    """The map of indicator `name`, one of `MAPS`, of one layer."""
    return _by_platform(functools.partial(_indicator_map, name), tiles, queries, keys)


def suitable_tiles(platform: str, heads: int) -> Tiles:
    """Tiles that fit registers and on-chip memory (docs/kernels.md)."""
    if platform == "gpu":
        return Tiles(32, 64)
    # A tile of a map has all heads of its queries and keys at hand.
    return Tiles(128 if heads <= 16 else 64, 128)


def _by_platform(function: Callable[..., Any], tiles: Tiles, *arrays: Any) -> Any:
    """Chosen when a program is lowered, so that programs can be exported for other machines."""
    heads = jax.tree.leaves(arrays)[0].shape[1]

    def on(platform: str) -> Callable[..., Any]:
        chosen = tiles if tiles.queries else suitable_tiles(platform, heads)
        return functools.partial(function, chosen, platform)

    return lax.platform_dependent(*arrays, cpu=on("cpu"), tpu=on("tpu"), default=on("gpu"))


def call(kernel: Any, platform: str, name: str, warps: int = 8, **arguments: Any) -> Any:
    """`pl.pallas_call` with the options of a platform; on a CPU, the interpreter.

    With fewer warps than 8, or larger tiles, the kernels of this file spill a GPU's registers
    (docs/kernels.md).
    """
    if platform == "cpu":
        return pl.pallas_call(kernel, name=name, interpret=True, **arguments)
    return pl.pallas_call(kernel, name=name, compiler_params=_params(platform, warps), **arguments)


def _params(platform: str, warps: int) -> Any:
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        # A later jax gives Triton up. Programs are traced for all platforms, so that must not stop
        # a TPU; on a GPU, jax then says what it cannot lower.
        return None
    return triton.CompilerParams(num_warps=warps, num_stages=2)


def _row_statistics(
    tiles: Tiles, platform: str, query: Array, key: Array, value: Array
) -> tuple[Array, Array]:
    *batch, queries, width = query.shape
    tokens = key.shape[-2]
    query = _pad(query, -2, tiles.queries)
    key, value = _pad(key, -2, tiles.keys), _pad(value, -2, tiles.keys)
    query, key, value = (pad_width(x) for x in (query, key, value))
    lead, (padded, wide) = tuple(batch), query.shape[-2:]

    def rows(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tiles.queries, columns), lambda b, h, i: (b, h, i, 0))

    keys = pl.BlockSpec((None, None, *key.shape[-2:]), lambda b, h, i: (b, h, 0, 0))
    rest, statistics = call(
        functools.partial(_statistics_kernel, tokens, tiles.keys),
        platform,
        "vit_interact_rows",
        grid=(*lead, padded // tiles.queries),
        in_specs=[rows(wide), keys, keys],
        out_specs=[rows(wide), rows(4)],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, padded, columns), jnp.float32) for columns in (wide, 4)
        ],
    )(query, key, value)
    return rest[..., :queries, :width], statistics[..., :queries, :]


def _statistics_kernel(
    tokens: int, size: int, q_ref: Any, k_ref: Any, v_ref: Any, rest_ref: Any, rows_ref: Any
) -> None:
    query = q_ref[...]
    count, blocks = query.shape[0], k_ref.shape[0] // size

    def block(i: Any) -> tuple[Array, Array, Any]:
        """Logits `[M, size]`, the numbers of their keys as floats, and where the keys are."""
        keys = pl.ds(pl.multiple_of(i * size, size), size)
        numbers = i * size + lax.broadcasted_iota(jnp.int32, (count, size), 1)
        logits = jnp.where(numbers < tokens, dot(query, k_ref[keys, :]), MASKED)
        return logits, numbers.astype(jnp.float32), keys

    def largest(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, which = carry
        logits, numbers, _ = block(i)
        here = jnp.max(logits, axis=1, keepdims=True)
        # Any of several largest ones will do: then none of them holds more than half.
        number = jnp.max(jnp.where(logits == here, numbers, -1.0), axis=1, keepdims=True)
        new = jnp.maximum(top, here)
        added = jnp.sum(jnp.exp(logits - new), axis=1, keepdims=True)
        return new, total * jnp.exp(top - new) + added, jnp.where(here > top, number, which)

    def add(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, output = carry
        logits, numbers, keys = block(i)
        # Left out, not subtracted: what is left of a row next to 1 may be 1e-9.
        weights = jnp.where(numbers == which, 0.0, jnp.exp(logits - top) * scale)
        output = output + dot(weights, v_ref[keys, :], transposed=False)
        return rest + jnp.sum(weights, axis=1, keepdims=True), output

    zeros = jnp.zeros((count, 1), jnp.float32)
    start = (jnp.full_like(zeros, 2 * MASKED), zeros, zeros)
    top, total, which = lax.fori_loop(0, blocks, largest, start)
    scale = 1.0 / total
    which = jnp.where(total < 2.0, which, -1.0)  # the largest weight is 1 / total
    rest, output = lax.fori_loop(0, blocks, add, (zeros, jnp.zeros(rest_ref.shape, jnp.float32)))
    rest_ref[...] = output
    for column, values in ((TOP, top), (SCALE, scale), (WHICH, which), (REST, rest)):
        rows_ref[:, pl.ds(column, 1)] = values


def _indicator_map(
    name: str, tiles: Tiles, platform: str, queries: QuerySide, keys: KeySide
) -> Array:
    batch, heads, rows, _ = queries.query.shape
    tokens = keys.key.shape[-2]
    queries = QuerySide(*(_maybe(_pad, x, -2, tiles.queries) for x in queries))
    wide = (_maybe(_pad, x, -2, tiles.keys) for x in keys[:2])
    keys = KeySide(*wide, own=_maybe(_pad, keys.own, -1, tiles.keys))
    queries = queries._replace(query=pad_width(queries.query), left=_maybe(pad_width, queries.left))
    keys = keys._replace(key=pad_width(keys.key), value=_maybe(pad_width, keys.value))

    def of_queries(array: Array) -> pl.BlockSpec:
        shape = (None, heads, tiles.queries, array.shape[-1])
        return pl.BlockSpec(shape, lambda b, i, j: (b, 0, i, 0))

    def of_keys(array: Array) -> pl.BlockSpec:
        if array is keys.own:
            return pl.BlockSpec((None, heads, 1, tiles.keys), lambda b, i, j: (b, 0, 0, j))
        return pl.BlockSpec(
            (None, heads, tiles.keys, array.shape[-1]), lambda b, i, j: (b, 0, j, 0)
        )

    padded = queries.query.shape[-2], keys.key.shape[-2]
    # Tiles that stand over the border are cut there by a TPU, but not by Triton.
    shape = padded if platform == "gpu" else (rows, tokens)
    found = call(
        functools.partial(_map_kernel, name, heads),
        platform,
        f"vit_interact_{name}",
        grid=(batch, padded[0] // tiles.queries, padded[1] // tiles.keys),
        in_specs=[jax.tree.map(of_queries, queries), jax.tree.map(of_keys, keys)],
        out_specs=pl.BlockSpec((None, tiles.queries, tiles.keys), lambda b, i, j: (b, i, j)),
        out_shape=jax.ShapeDtypeStruct((batch, *shape), jnp.float32),
    )(queries, keys)
    # What stands in the padding need not even be finite.
    return found[:, :rows, :tokens]


def _map_kernel(name: str, heads: int, queries: QuerySide, keys: KeySide, out_ref: Any) -> None:
    def weights(h: Any) -> Array:
        logits = dot(queries.query[h], keys.key[h])
        return jnp.exp(logits - _column(queries.rows, h, TOP)) * _column(queries.rows, h, SCALE)

    # Outside the loop over heads: interpreted, the number of a program is not known inside.
    count, size = out_ref.shape
    numbers = pl.program_id(2) * size + lax.broadcasted_iota(jnp.int32, (count, size), 1)
    numbers = numbers.astype(jnp.float32)

    def cut(h: Any) -> tuple[Array, Array]:
        """`A/(1-A)`, 0 at the key that dominates its row, and where that is."""
        dominates = numbers == _column(queries.rows, h, WHICH)
        rest = jnp.where(dominates, 0.0, weights(h))
        return rest / (1.0 - rest), dominates

    add_head, start, finish = MAPS[name](heads, queries, keys, cut if name in _CUTS else weights)
    carry = tuple(jnp.zeros(out_ref.shape, jnp.float32) for _ in range(start))
    out_ref[...] = finish(*lax.fori_loop(0, heads, add_head, carry))


# Each of these gives what adds a head to a tile, how many tiles that needs, and what ends the sum.
# The formulas are those of interactions/indicators.py.


def _attention(heads: int, queries: QuerySide, keys: KeySide, weights: OfHead) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        return (carry[0] + weights(h),)

    return add_head, 1, lambda total: total / heads


def _dispersion(heads: int, queries: QuerySide, keys: KeySide, weights: OfHead) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # Welford's update: a difference of two sums would cancel.
        mean, squares = carry
        new = weights(h)
        above = new - mean
        mean = mean + above / (h + 1).astype(jnp.float32)
        return mean, squares + above * (new - mean)

    return add_head, 2, lambda mean, squares: jnp.sqrt(jnp.maximum(squares, 0.0) / heads)


def _gradient(heads: int, queries: QuerySide, keys: KeySide, weights: OfHead) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        slope = dot(queries.left[h], keys.value[h])
        return (carry[0] + jnp.maximum(weights(h) * slope, 0.0),)

    return add_head, 1, lambda total: total / heads


def _leave_one_out(heads: int, queries: QuerySide, keys: KeySide, cut: OfHead) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        factor, dominates = cut(h)
        cross = dot(queries.left[h], keys.value[h])
        distance = jnp.maximum(_column(queries.ends, h, OWN) - 2.0 * cross + keys.own[h], 0.0)
        dominant = _column(queries.ends, h, DOMINANT)
        return (carry[0] + jnp.where(dominates, dominant, factor * factor * distance),)

    return add_head, 1, jnp.sqrt


def _edge(heads: int, queries: QuerySide, keys: KeySide, cut: OfHead) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        factor, dominates = cut(h)
        towards = dot(queries.left[h], keys.value[h])
        change = factor * (_column(queries.ends, h, OWN) - towards)
        return (carry[0] + jnp.where(dominates, _column(queries.ends, h, DOMINANT), change),)

    return add_head, 1, jnp.abs


MAPS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "attention": _attention,
    "dispersion": _dispersion,
    "gradient": _gradient,
    "leave_one_out": _leave_one_out,
    "edge": _edge,
}
_CUTS = ("leave_one_out", "edge")


def _column(ref: Any, h: Any, column: int) -> Array:
    return ref[h, :, pl.ds(column, 1)]


def dot(left: Array, right: Array, transposed: bool = True) -> Array:
    """`left @ right.T`, or `left @ right`, in float32; not in tf32 or bf16 when given float32."""
    exact = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _maybe(function: Callable[..., Array], array: Array | None, *arguments: Any) -> Array | None:
    return None if array is None else function(array, *arguments)


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """Zeros behind `axis`, up to a multiple."""
    return _pad_to(array, axis, -(-array.shape[axis] // multiple) * multiple)


def pad_width(array: Array) -> Array:
    """Width of a head up to a power of two that a tensor core takes; zeros add nothing."""
    return _pad_to(array, -1, max(16, 1 << (array.shape[-1] - 1).bit_length()))


def _pad_to(array: Array, axis: int, size: int) -> Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, padding)
