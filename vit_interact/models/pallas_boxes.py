"""Pallas kernels for NVIDIA's GPUs: attention within windows that skips tiles of keys.

Patches are worked on in tiles of the grid. What the windows of a tile's queries reach together lies
in a box of tiles, and what all of them hold in a smaller one inside: a program goes through the
inner box as plain attention does, and through the ring around it with a mask, with a running
softmax (Milakov & Gimelshein 2018, as in FlashAttention). Boxes need no lists: where a tile lies
follows from the number of the step, so that loads are known ahead. Prefix tokens are a program of
their own as queries, and a first step of every program as keys. Backward, one kernel goes through
the same boxes for the queries, another for keys and values through the boxes of tiles of queries
that need them. `models/window_attention.py` is the way in; a CPU interprets this, for tests.

A tile that reaches beyond the grid holds the last rows and columns again. What must not count twice
is masked; else copies give the same bits, as one program makes both, and are written twice.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from vit_interact.layout import TokenLayout
from vit_interact.models.pallas_gpu import Sizes, add_keys, call, exp2, of_image
from vit_interact.models.tile_maps import LOG2_E, LOWEST, dot, pad_width

_PREFIX = 16  # prefix tokens at most, and what a tensor core takes at least
_FAR = 2.0**101  # the unit of places; half of it, taken off a logit, leaves less than `LOWEST`


class _Tiles(NamedTuple):
    """How a grid is cut.

    Attributes:
      layout: the grid of patches and the prefix tokens.
      rows: rows of a tile, a power of two.
      cols: its columns, a power of two.
      down: tiles in a column of them.
      across: tiles in a row of them.
    """

    layout: TokenLayout
    rows: int
    cols: int
    down: int
    across: int

    @property
    def size(self) -> int:
        """Patches in a tile."""
        return self.rows * self.cols

    @property
    def first(self) -> int:
        """The program of the first tile: after that of the prefix tokens, if there are any."""
        return int(self.layout.prefix > 0)

    def cells(self, down: Any, across: Any) -> tuple[Array, Array]:
        """Rows and columns of a tile's cells `[size]`; some may lie beyond the grid."""
        number = lax.iota(jnp.int32, self.size)
        row = down * self.rows + (number >> (self.cols.bit_length() - 1))
        return row, across * self.cols + (number & (self.cols - 1))

    def on_grid(self, row: Array, col: Array) -> tuple[Array, Array]:
        """Cells; in place of those beyond the grid, the last ones."""
        if self.layout.rows % self.rows:
            row = jnp.minimum(row, self.layout.rows - 1)
        if self.layout.cols % self.cols:
            col = jnp.minimum(col, self.layout.cols - 1)
        return row, col

    def patches(self, row: Array, col: Array) -> Array:
        """Numbers of the patches of cells."""
        row, col = self.on_grid(row, col)
        return row * self.layout.cols + col


def suitable_tiles(layout: TokenLayout, dtype: Any) -> _Tiles | None:
    """Tiles whose products do not spill a GPU's registers; None where a mask must do.

    That is for grids smaller than a tile, and for more than 16 prefix tokens.
    """
    rows, cols = (4, 8) if dtype == jnp.float32 else (8, 8)
    if layout.rows < rows or layout.cols < cols or layout.prefix > _PREFIX:
        return None
    return _Tiles(layout, rows, cols, -(-layout.rows // rows), -(-layout.cols // cols))


def computed_share(
    windows: Int[Array, "*batch P 4"] | Int[np.ndarray, "*batch P 4"],
    layout: TokenLayout,
    dtype: Any,
) -> Float[Array, "*batch"]:
    """As `window_attention.computed_share`, forward: whole tiles, 16 prefix tokens if any."""
    tiles = _tiles(layout, dtype)
    top, left, bottom, right = jnp.moveaxis(_plan(jnp.asarray(windows), tiles)[..., :4], -1, 0)
    keys = (bottom - top) * (right - left) * tiles.size + tiles.first * _PREFIX
    share = keys.sum(axis=-1) * (tiles.size / layout.num_tokens**2)
    return share.reshape(windows.shape[:-2])


def attend(
    layout: TokenLayout,
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    windows: Int[Array, "B P 4"],
    interpret: bool = False,
) -> Float[Array, "B N H K"]:
    """Attention within windows, once differentiable; interpreted, it needs no GPU.

    A patch with an empty window sees the prefix tokens only; without any its output is 0.

    Raises:
      ValueError: if `suitable_tiles` finds none.
    """
    windows = windows.astype(jnp.int32)
    return _attend(_tiles(layout, query.dtype), interpret, query, key, value, windows)


def _tiles(layout: TokenLayout, dtype: Any) -> _Tiles:
    tiles = suitable_tiles(layout, dtype)
    if tiles is None:
        raise ValueError(f"{layout}: a grid of a tile and at most {_PREFIX} prefix tokens expected")
    return tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(tiles: _Tiles, interpret: bool, *arrays: Array) -> Array:
    return _attend_fwd(tiles, interpret, *arrays)[0]


def _attend_fwd(tiles: _Tiles, interpret: bool, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    *heads, windows = arrays
    q, k, v = (pad_width(array) for array in heads)
    like = v, jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)
    plan = _plan(windows, tiles)
    output, log = _run(_forward_kernel, "windows", tiles, interpret, like, plan, windows, q, k, v)
    output = output[..., : heads[2].shape[-1]]
    return output, (*arrays, plan, output, log)


def _attend_bwd(tiles: _Tiles, interpret: bool, kept: Any, grad: Array) -> tuple[Any, ...]:
    *heads, windows, plan, output, log = kept
    along = jnp.sum(output.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1, keepdims=True)
    q, k, v, g = (pad_width(array) for array in (*heads, grad.astype(heads[2].dtype)))
    arrays = windows, q, k, v, g, log, along
    found = _run(_queries_kernel, "windows_queries", tiles, interpret, (q,), plan, *arrays)
    plan = _plan_of_keys(plan, tiles)
    found += _run(_keys_kernel, "windows_keys", tiles, interpret, (k, v), plan, *arrays)
    return *(x[..., : array.shape[-1]] for x, array in zip(found, heads, strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _plan(windows: Int[Array, "*batch P 4"], tiles: _Tiles) -> Int[Array, "B programs 8"]:
    """What each program needs of the keys, in tiles: (top, left, bottom, right) of two boxes.

    One holds all that any of its windows reaches; one inside it, what all of them hold.
    """
    layout, sides = tiles.layout, np.array([tiles.rows, tiles.cols], np.int32)
    ends = np.array([layout.rows, layout.cols], np.int32)
    grid = jnp.clip(windows.reshape(-1, *ends, 4), 0, np.tile(ends, 2)).astype(jnp.int32)
    empty = jnp.any(grid[..., :2] >= grid[..., 2:], axis=-1, keepdims=True)
    grid = jnp.where(empty, np.array([*ends, 0, 0], np.int32), grid)  # reaches nothing
    below, behind = np.array([tiles.down, tiles.across]) * sides - ends
    grid = jnp.pad(grid, [(0, 0), (0, below), (0, behind), (0, 0)], mode="edge")
    grid = grid.reshape(-1, tiles.down, tiles.rows, tiles.across, tiles.cols, 4)
    least, most = grid.min(axis=(2, 4)), grid.max(axis=(2, 4))

    start = least[..., :2] // sides
    end = jnp.maximum(start, (most[..., 2:] + (sides - 1)) // sides)
    corners = (most[..., :2] + (sides - 1)) // sides, least[..., 2:] // sides
    some = jnp.all(corners[0] < corners[1], axis=-1, keepdims=True)
    inner = (jnp.where(some, corner, start) for corner in corners)
    plan = jnp.concatenate([start, end, *inner], axis=-1).reshape(len(grid), -1, 8)
    return _with_prefix(plan, tiles, 0, 0, tiles.down, tiles.across, 0, 0, *ends // sides)


def _plan_of_keys(plan: Int[Array, "B programs 8"], tiles: _Tiles) -> Int[Array, "B programs 4"]:
    """For each program's tile of keys, the box of tiles of queries that need it."""
    top, left, bottom, right = jnp.moveaxis(plan[:, tiles.first :, :4, None], 2, 0)
    down, across = np.divmod(np.arange(top.shape[1], dtype=np.int32), tiles.across)
    needed = ((top <= down) & (down < bottom) & (left <= across) & (across < right))[..., None]
    ends, places = np.array([tiles.down, tiles.across], np.int32), np.stack([down, across], -1)
    start = jnp.min(jnp.where(needed, places[:, None], ends), axis=1)
    end = jnp.max(jnp.where(needed, places[:, None] + 1, 0), axis=1)
    boxes = jnp.concatenate([start, jnp.maximum(start, end)], axis=-1)
    return _with_prefix(boxes, tiles, 0, 0, tiles.down, tiles.across)


def _with_prefix(boxes: Array, tiles: _Tiles, *whole: Any) -> Array:
    """The boxes of all programs; that of the prefix tokens needs the whole grid."""
    of_prefix = jnp.broadcast_to(np.array(whole, np.int32), (len(boxes), tiles.first, len(whole)))
    return jnp.concatenate([of_prefix, boxes], axis=1)


def _run(
    kernel: Any, name: str, tiles: _Tiles, interpret: bool, like: Any, plan: Array, windows: Array,
    *arrays: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """Outputs, `like` those, of a kernel for each tile of each head; arrays `[B, N, H, ...]`."""

    def of_head(array: Any) -> pl.BlockSpec:
        _, tokens, _, columns = array.shape
        return pl.BlockSpec((None, tokens, None, columns), lambda b, h, i: (b, 0, h, 0))

    batch, _, heads, _ = arrays[0].shape
    how = (8, 2) if arrays[0].dtype == jnp.float32 else (4, 3)
    return call(
        functools.partial(kernel, tiles, functools.partial(exp2, interpret)),
        Sizes(tiles.size, tiles.size, *how),
        name,
        interpret,
        grid=(batch, heads, tiles.first + tiles.down * tiles.across),
        in_specs=[of_image(plan), of_image(windows), *map(of_head, arrays)],
        out_specs=tuple(map(of_head, like)),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
    )(plan, windows, *arrays)


def _own(tiles: _Tiles) -> tuple[Any, Any, tuple[Array, Array], Array]:
    """A program's number; whether it is of the prefix tokens; its tile's cells; its tokens."""
    program, prefix = pl.program_id(2), tiles.layout.prefix
    tile = jnp.maximum(program - tiles.first, 0)
    down = lax.div(tile, jnp.int32(tiles.across))
    cells = tiles.on_grid(*tiles.cells(down, tile - down * tiles.across))
    tokens, is_prefix = prefix + tiles.patches(*cells), program < tiles.first
    if prefix:  # copies of the last one fill the tile up
        first = jnp.minimum(lax.iota(jnp.int32, tiles.size), prefix - 1)
        tokens = jnp.where(is_prefix, first, tokens)
    return program, is_prefix, cells, tokens


def _middles(tiles: _Tiles, windows: Any, patches: Array, everywhere: Any) -> list[Array]:
    """Middle and half the length of windows, of rows and then of columns `[size]`."""
    found = []
    for axis, end in enumerate((tiles.layout.rows, tiles.layout.cols)):
        first, last = windows[patches, axis], jnp.minimum(windows[patches, axis + 2], end)
        if tiles.first:
            first, last = jnp.where(everywhere, 0, first), jnp.where(everywhere, end, last)
        found += [_far(first + last - 1) * 0.5, _far(last - first) * 0.5]
    return found


def _far(places: Any) -> Array:
    return places.astype(jnp.float32) * _FAR


def _penalty(middles: list[Array], places: list[Array]) -> Array:
    """What to add to logits of queries (first axis) and keys: 0 in the window, else -1e30 or less.

    Sums of float32, as a GPU does many of these: of comparisons a compiler makes bits, and unpacks
    them one by one. Taken from a row's largest or sum, which start at -1e30, weights become 0.
    """
    parts = []
    for axis, place in enumerate(places):
        middle, half = (lax.expand_dims(x, (1,)) for x in middles[2 * axis : 2 * axis + 2])
        parts += [jnp.minimum(half - jnp.abs(lax.expand_dims(place, (0,)) - middle), 0.0)]
    return parts[0] + parts[1]


def _logits(query: Array, key: Array, penalty: Array | None) -> Array:
    logits = dot(query, key)
    return logits if penalty is None else logits + penalty


def _prefix(tiles: _Tiles, axis: int) -> tuple[Array, Array]:
    """Prefix tokens and copies of the last of them up to 16; a penalty of these, along an axis."""
    number, prefix = lax.iota(jnp.int32, _PREFIX), tiles.layout.prefix
    penalty = lax.expand_dims(jnp.where(number < prefix, 0.0, 2.0 * LOWEST), (1 - axis,))
    return jnp.minimum(number, prefix - 1), penalty


def _divide(number: Any, by: Any) -> tuple[Any, Any]:
    """Quotient and rest; an integer division takes a GPU dozens of instructions."""
    inverse = 1.0 / jnp.maximum(by, 1).astype(jnp.float32)
    quotient = ((number.astype(jnp.float32) + 0.5) * inverse).astype(jnp.int32)
    return quotient, number - quotient * by


def _over_keys(tiles: _Tiles, mine: Any, plan: Any, windows: Any, step: Any, carry: Any) -> Any:
    """`step(tokens, penalty, carry)` for the keys that a program's queries need."""
    program, is_prefix, cells, _ = mine
    prefix = tiles.layout.prefix
    if prefix:
        carry = step(*_prefix(tiles, 1), carry)
    top, left, bottom, right, *inner = (plan[program, side] for side in range(8))
    inner_top, inner_left, inner_bottom, inner_right = inner
    height, width = inner_bottom - inner_top, inner_right - inner_left

    def whole(t: Any, carry: Any) -> Any:
        down, across = _divide(t, width)
        row, col = tiles.cells(inner_top + down, inner_left + across)
        return step(prefix + row * tiles.layout.cols + col, None, carry)

    carry = lax.fori_loop(0, height * width, whole, carry)

    # The ring: whole rows of tiles above and below the inner box, then what lies beside it.
    in_rows = (bottom - top - height) * (right - left)
    row, half_row, col, half_col = _middles(tiles, windows, tiles.patches(*cells), is_prefix)
    places = [_far(x) for x in tiles.cells(0, 0)]

    def partly(t: Any, carry: Any) -> Any:
        down, across = _divide(t, right - left)
        down = jnp.where(top + down < inner_top, down, down + height)
        down_beside, beside = _divide(t - in_rows, right - left - width)
        beside = jnp.where(left + beside < inner_left, beside, beside + width)
        down = jnp.where(t < in_rows, top + down, inner_top + down_beside)
        across = left + jnp.where(t < in_rows, across, beside)
        middles = [row - _far(down * tiles.rows), half_row, col - _far(across * tiles.cols)]
        tokens = prefix + tiles.patches(*tiles.cells(down, across))
        return step(tokens, _penalty([*middles, half_col], places), carry)

    beside = height * (right - left - width)
    return lax.fori_loop(0, in_rows + beside, partly, carry)


def _forward_kernel(tiles: _Tiles, exp2: Any, plan: Any, windows: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, out_ref, log_ref = refs
    *_, own = mine = _own(tiles)
    query = q_ref[own, :]

    def step(keys: Array, penalty: Array | None, carry: Any) -> Any:
        logits = _logits(query, k_ref[keys, :], penalty)
        return add_keys(exp2, logits, v_ref[keys, :], carry)

    column = jnp.zeros((tiles.size, 1), jnp.float32)
    start = column + LOWEST, column, jnp.zeros((tiles.size, v_ref.shape[1]), jnp.float32)
    top, total, output = _over_keys(tiles, mine, plan, windows, step, start)
    total = jnp.where(total > 0.0, total, 1.0)  # an empty window and no prefix tokens
    out_ref[own, :] = (output / total).astype(out_ref.dtype)
    log_ref[own, :] = top + jnp.log2(total)


def _queries_kernel(tiles: _Tiles, exp2: Any, plan: Any, windows: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, g_ref, log_ref, along_ref, out_ref = refs
    *_, own = mine = _own(tiles)
    query, grad = q_ref[own, :], g_ref[own, :]
    log, along = (x[own, 0][:, None] for x in (log_ref, along_ref))  # not [M, 1]: see pallas_gpu.py

    def step(keys: Array, penalty: Array | None, total: Array) -> Array:
        key = k_ref[keys, :]
        weights = exp2(_logits(query, key, penalty) * LOG2_E - log)
        slope = weights * (dot(grad, v_ref[keys, :]) - along)
        return total + dot(slope.astype(key.dtype), key, transposed=False)

    zeros = jnp.zeros(query.shape, jnp.float32)
    found = _over_keys(tiles, mine, plan, windows, step, zeros)
    out_ref[own, :] = found.astype(out_ref.dtype)


def _keys_kernel(tiles: _Tiles, exp2: Any, plan: Any, windows: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, g_ref, log_ref, along_ref, key_ref, value_ref = refs
    layout, (program, is_prefix, cells, own) = tiles.layout, _own(tiles)
    key, value = k_ref[own, :], v_ref[own, :]

    def step(queries: Array, penalty: Array, carry: Any) -> Any:
        # Weights are turned round for the last products only: along rows of a tile, a thread holds
        # two queries' windows and sums; along columns it would have to load those of sixteen.
        query, grad = q_ref[queries, :], g_ref[queries, :]
        log, along = (x[queries, 0][:, None] for x in (log_ref, along_ref))
        weights = exp2(_logits(query, key, penalty) * LOG2_E - log)
        slope = weights * (dot(grad, value) - along)
        of_key, of_value = carry
        return (
            of_key + dot(slope.astype(query.dtype).T, query, transposed=False),
            of_value + dot(weights.astype(grad.dtype).T, grad, transposed=False),
        )

    carry: Any = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    if layout.prefix:
        carry = step(*_prefix(tiles, 0), carry)
    top, left, bottom, right = (plan[program, side] for side in range(4))
    places = [_far(x) for x in cells]

    def partly(t: Any, carry: Any) -> Any:
        down, across = _divide(t, right - left)
        row, col = tiles.cells(top + down, left + across)
        patches = tiles.patches(row, col)
        middles = _middles(tiles, windows, patches, is_prefix)
        # Copies must not count twice: their windows hold nothing.
        middles[1] = jnp.where((row < layout.rows) & (col < layout.cols), middles[1], -_FAR)
        return step(layout.prefix + patches, _penalty(middles, places), carry)

    of_key, of_value = lax.fori_loop(0, (bottom - top) * (right - left), partly, carry)
    key_ref[own, :] = of_key.astype(key_ref.dtype)
    value_ref[own, :] = of_value.astype(value_ref.dtype)
