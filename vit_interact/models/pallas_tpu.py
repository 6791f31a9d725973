"""Pallas kernels for TPUs: attention's row statistics, and indicators tile by tile.

Weights exist for one tile of queries and keys of one head at a time, in on-chip memory. Two kernels
share the work:

* **Row statistics**: one program a block of queries of a head. A first loop over the keys finds
  each row's largest logit, a second one what the other keys add up to.
* **Maps**: one program a tile of the map. A loop over heads makes the tile's weights again from the
  statistics and adds up the indicator, so that `[B, N, N]` is all that is written.

They keep to what Mosaic knows: two-dimensional tiles whose sides are powers of two, loops, slices
of references and no slices of values. A row's statistics are columns `[M, 1]`, which broadcast
against a tile without a transposition. `models/tiled.py` is the way in; this module is imported
when it is first used, as Pallas takes a while to load.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from vit_interact.models.tile_maps import (
    LOG,
    LOG2_E,
    LOWEST,
    REST,
    WHICH,
    MapSides,
    Tile,
    dot,
    pad_to,
    pad_width,
    whole_tile,
)

Sides = tuple[int, int]


def cut_rows(
    query: Float[Array, "B M H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    tile: Sides | None,
    interpret: bool,
) -> tuple[Float[Array, "B M H K"], Float[Array, "B H M 3"]]:
    """Values of each row's other keys weighted by `exp(logit - largest)`; columns of the rows."""
    queries, width, tokens = query.shape[1], query.shape[3], key.shape[1]
    sides = tile or _suitable(query.shape[2])
    query, key, value = (_heads_first(x) for x in (query, key, value))
    query = pad_width(_pad(query, -2, sides[0]))
    key, value = (pad_width(_pad(x, -2, sides[1])) for x in (key, value))
    lead, (padded, wide) = query.shape[:2], query.shape[-2:]

    def rows(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, sides[0], columns), lambda b, h, i: (b, h, i, 0))

    keys = pl.BlockSpec((None, None, *key.shape[-2:]), lambda b, h, i: (b, h, 0, 0))
    rest, statistics = call(
        functools.partial(_rows_kernel, tokens, sides[1]),
        interpret,
        "vit_interact_rows",
        grid=(*lead, padded // sides[0]),
        in_specs=[rows(wide), keys, keys],
        out_specs=[rows(wide), rows(3)],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, padded, columns), jnp.float32) for columns in (wide, 3)
        ],
    )(query, key, value)
    return jnp.swapaxes(rest[..., :queries, :width], 1, 2), statistics[..., :queries, :]


def stacked_maps(
    name: str, layers: Sequence[MapSides], tile: Sides | None, interpret: bool
) -> Float[Array, "L B M N"]:
    """The map of an indicator of several layers; arrays of `layers` as the model has them."""
    first = layers[0]
    shape = (len(layers), first.query.shape[0], first.query.shape[1], first.key.shape[1])
    stack = jnp.zeros(shape, jnp.float32)
    for layer, sides in enumerate(layers):
        # Not a concatenation, which would hold all layers and the result at once.
        stack = stack.at[layer].set(_indicator_map(name, sides, tile, interpret))
    return stack


def _indicator_map(
    name: str, sides: MapSides, tile: Sides | None, interpret: bool
) -> Float[Array, "B M N"]:
    rows, tokens = sides.query.shape[1], sides.key.shape[1]
    size = tile or _suitable(sides.query.shape[2])
    if sides.left is not None:
        sides = sides._replace(value=sides.value.astype(sides.left.dtype))
    wide = dict.fromkeys(("query", "key", "left", "value"), _heads_first)
    sides = sides.map(**wide).map(**dict.fromkeys(wide, pad_width))
    by_rows = dict.fromkeys(("query", "rows", "left", "ends"), lambda x: _pad(x, -2, size[0]))
    by_keys = dict.fromkeys(("key", "value"), lambda x: _pad(x, -2, size[1]))
    sides = sides.map(**by_rows, **by_keys, own=lambda x: _pad(x, -1, size[1]))
    batch, heads, queries, _ = sides.query.shape
    keys = sides.key.shape[-2]

    def spec(field: str, array: Array) -> pl.BlockSpec:
        if field in by_rows:
            shape = (None, heads, size[0], array.shape[-1])
            return pl.BlockSpec(shape, lambda b, i, j: (b, 0, i, 0))
        if field == "own":
            return pl.BlockSpec((None, heads, 1, size[1]), lambda b, i, j: (b, 0, 0, j))
        return pl.BlockSpec((None, heads, size[1], array.shape[-1]), lambda b, i, j: (b, 0, j, 0))

    given = {field: array for field, array in sides._asdict().items() if array is not None}
    return call(
        functools.partial(_map_kernel, name, heads, tuple(given)),
        interpret,
        f"vit_interact_{name}",
        grid=(batch, queries // size[0], keys // size[1]),
        in_specs=[spec(field, array) for field, array in given.items()],
        out_specs=pl.BlockSpec((None, *size), lambda b, i, j: (b, i, j)),
        # Tiles that stand over the border are cut there.
        out_shape=jax.ShapeDtypeStruct((batch, rows, tokens), jnp.float32),
    )(*given.values())


def _suitable(heads: int) -> Sides:
    """Tiles that fit on-chip memory, all heads of queries and keys together (docs/kernels.md)."""
    return 128 if heads <= 16 else 64, 128


def call(kernel: Any, interpret: bool, name: str, **arguments: Any) -> Any:
    """`pl.pallas_call` with the options of a TPU, or Pallas' interpreter."""
    if interpret:
        return pl.pallas_call(kernel, name=name, interpret=True, **arguments)
    from jax.experimental.pallas import tpu

    how = tpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    return pl.pallas_call(kernel, name=name, compiler_params=how, **arguments)


def _rows_kernel(
    tokens: int, size: int, q_ref: Any, k_ref: Any, v_ref: Any, rest_ref: Any, rows_ref: Any
) -> None:
    query = q_ref[...]
    count, blocks = query.shape[0], k_ref.shape[0] // size

    def block(i: Any) -> tuple[Array, Array, Any]:
        """Logits `[M, size]`, the numbers of their keys as floats, and where the keys are."""
        keys = pl.ds(pl.multiple_of(i * size, size), size)
        numbers = i * size + lax.broadcasted_iota(jnp.int32, (count, size), 1)
        logits = jnp.where(numbers < tokens, dot(query, k_ref[keys, :]) * LOG2_E, LOWEST)
        return logits, numbers.astype(jnp.float32), keys

    def largest(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        top, which = carry
        logits, numbers, _ = block(i)
        here = jnp.max(logits, axis=1, keepdims=True)
        # Any of several largest ones will do: the others hold at most a half each, too.
        number = jnp.max(jnp.where(logits == here, numbers, -1.0), axis=1, keepdims=True)
        return jnp.maximum(top, here), jnp.where(here > top, number, which)

    def add(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, output = carry
        logits, numbers, keys = block(i)
        # Left out, not subtracted: what is left of a row next to 1 may be 1e-9.
        weights = jnp.where(numbers == which, 0.0, jnp.exp2(logits - top))
        value = v_ref[keys, :].astype(jnp.float32)
        output = output + dot(weights, value, transposed=False)
        return rest + jnp.sum(weights, axis=1, keepdims=True), output

    zeros = jnp.zeros((count, 1), jnp.float32)
    top, which = lax.fori_loop(0, blocks, largest, (zeros + 2 * LOWEST, zeros))
    rest, output = lax.fori_loop(0, blocks, add, (zeros, jnp.zeros(rest_ref.shape, jnp.float32)))
    rest_ref[...] = output
    columns = {LOG: top + jnp.log2(1.0 + rest), WHICH: which, REST: rest}
    for column, values in columns.items():
        rows_ref[:, pl.ds(column, 1)] = values


def _map_kernel(name: str, heads: int, fields: tuple[str, ...], *refs: Any) -> None:
    sides, out_ref = dict(zip(fields, refs[:-1], strict=True)), refs[-1]
    # Outside the loop over heads: interpreted, the number of a program is not known inside.
    count, size = out_ref.shape
    numbers = pl.program_id(2) * size + lax.broadcasted_iota(jnp.int32, (count, size), 1)
    tile = Tile(
        numbers,
        jnp.exp2,
        logits=lambda h: dot(sides["query"][h], sides["key"][h]),
        rows=lambda h, column: sides["rows"][h, :, pl.ds(column, 1)],
        ends=lambda h, column: sides["ends"][h, :, pl.ds(column, 1)],
        cross=lambda h: dot(sides["left"][h], sides["value"][h]),
        own=lambda h: sides["own"][h],
    )
    out_ref[...] = whole_tile(name, heads, tile)


def _heads_first(array: Float[Array, "B N H K"]) -> Float[Array, "B H N K"]:
    return jnp.swapaxes(array, 1, 2)


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """Zeros behind `axis`, up to a multiple."""
    return pad_to(array, axis, -(-array.shape[axis] // multiple) * multiple)
