"""Adaptive attention windows: for each query patch the smallest box that holds its interaction.

How the search works, and why this way. For one column `c` of queries, every triple (query row
`r`, `top <= r < bottom`) is one *lane*: a band of rows whose prefix sums along the columns are
`D[k]`, the mass of the band left of column `k`. A box of width `w` in that band holds
`D[l+w] - D[l]`, so the largest mass `M[w]` of every band and width is a subtraction and a maximum
over the few lefts that keep `c` inside: no gather, no search, no branch, only long contiguous
lanes. This looks at every box that contains the query, yet runs at the speed of the vector unit:
about ten times faster on a CPU than sweeping (top, bottom, left) with a binary search for
right, which needs a gather a step. As queries are grouped by column, lanes and lefts are only those
that exist: on a square grid of side `n`, `((n+1)(n+2)/6)^2` boxes a query on average.

`M` does not depend on the coverage, so several coverages share it; they differ only in what is read
from it: the smallest area, the largest mass at that area, and the first box within the tolerance.

Slower, when measured on a 37x37 grid: widths unrolled in Python (5 times: long to compile, and into
kernels without vector instructions); several maps at a time on a CPU (3 times: they leave the
cache); all tied heights at once in the last step (1.3 times: a gather for each height and left).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from vit_interact.layout import TokenLayout

TOLERANCE = 1e-6
"""Shares of mass that differ by less are equal: both for the coverage and for ties."""

# Lefts a loop step: fewer kernel launches. Beyond about 6, CPU kernels lose their vectors.
_UNROLL = 4


def unit_rows(
    patch_indicator: Float[Array, "*rows P"] | Float[np.ndarray, "*rows P"],
) -> tuple[Float[Array, "*rows P"], Bool[Array, "*rows"]]:
    """Divides each row by its sum, in float32.

    Args:
      patch_indicator: rows of a non-negative patch-to-patch indicator `[..., P]`, any unit.

    Returns:
      The rows, each with sum 1, and whether each row could be normalised. Rows that sum to zero, or
      that hold NaN or infinity, come back as zeros.
    """
    rows = jnp.asarray(patch_indicator, jnp.float32)
    # Divided by the largest entry first, so that the sum of large entries does not overflow.
    scale = lax.stop_gradient(rows.max(axis=-1, keepdims=True))
    usable = (scale > 0) & jnp.isfinite(scale)
    rows = jnp.where(usable, rows / jnp.where(usable, scale, 1.0), 0.0)
    total = rows.sum(axis=-1, keepdims=True)
    usable = usable & (total > 0) & jnp.isfinite(total)
    rows = jnp.where(usable, rows / jnp.where(usable, total, 1.0), 0.0)
    return rows, usable[..., 0]


def smallest_windows(
    patch_indicator: Float[Array, "*batch P P"] | Float[np.ndarray, "*batch P P"],
    layout: TokenLayout,
    coverage: float | Sequence[float] = 0.9,
) -> Int32[Array, "*windows P 4"]:
    """The smallest box around each query patch that holds `coverage` of its interaction. Exact.

    The box contains the query and at least the share `coverage - 1e-6` of its row. Among boxes of
    the smallest area: those whose mass is within 1e-6 of the largest, and of them the smallest
    (top, left, bottom, right). Rows need not be normalised; a row of zeros gets the 1x1 box at its
    query. Masses are float32 sums, good to about 3e-7 of a row: boxes closer than that to the
    coverage, or to the tolerance of a tie, can be taken for one or the other side.

    Maps are worked on in chunks, so that temporary memory stays bounded whatever the batch: 4 MiB a
    chunk on a CPU, 256 MiB on an accelerator, or one map if that takes more (a 37x37 grid: 12 MiB).
    On a CPU, XLA adds a float32 copy of bfloat16 input. With leading axes sharded over devices,
    call this inside `jax.shard_map`: the loop over chunks is then local to each device.

    Args:
      patch_indicator: non-negative patch-to-patch indicator `[..., P, P]`, query first.
      layout: the grid of patches.
      coverage: share of a row in (0, 1], or several: they share the costly part of the work.

    Returns:
      (top, left, bottom, right) in patches, bottom and right exclusive: `[..., P, 4]`, or
      `[Q, ..., P, 4]` for `Q` coverages.

    Raises:
      ValueError: if a coverage is outside (0, 1], none is given, or the shape is not the layout's.
    """
    several = isinstance(coverage, Sequence)
    coverages = _checked_coverages(coverage if isinstance(coverage, Sequence) else (coverage,))
    layout.check_patches(np.shape(patch_indicator), "patch_indicator")
    return _of_all_patches(patch_indicator, layout, coverages, several)


@partial(jax.jit, static_argnames=("layout", "coverages", "several"))
def _of_all_patches(
    patch_indicator: Float[Array, "*batch P P"],
    layout: TokenLayout,
    coverages: tuple[float, ...],
    several: bool,
) -> Int32[Array, "*windows P 4"]:
    """`smallest_windows` as one program, also when called outside jit."""
    batch, patches = patch_indicator.shape[:-2], layout.num_patches
    maps = jnp.asarray(patch_indicator).reshape(-1, layout.rows, layout.cols, patches)
    windows = _search(maps, np.arange(layout.cols, dtype=np.int32), layout, coverages, 1)
    windows = windows.transpose(2, 0, 3, 1, 4)  # [Q, maps, R, C, 4]
    windows = windows.reshape(len(coverages), *batch, patches, 4)
    return windows if several else windows[0]


def windows_of_columns(
    rows: Float[Array, "*batch W R P"],
    cols: Int32[Array, " W"],
    layout: TokenLayout,
    coverages: Sequence[float],
) -> Int32[Array, "*batch W R Q 4"]:
    """`smallest_windows` for the queries of some columns of the grid only.

    Args:
      rows: rows of a non-negative patch-to-patch indicator, by column and row of the query.
      cols: which columns of the grid they are of, `[W]`.
      layout: the grid of patches.
      coverages: shares of a row in (0, 1].

    Returns:
      (top, left, bottom, right) in patches `[..., W, R, Q, 4]`.

    Raises:
      ValueError: if a coverage is outside (0, 1], or none is given.
    """
    coverages = _checked_coverages(coverages)
    maps = rows.reshape(-1, *rows.shape[-3:])
    windows = _search(maps, cols, layout, coverages, 0)
    return jnp.moveaxis(windows, 2, 3).reshape(*rows.shape[:-1], len(coverages), 4)


def _checked_coverages(coverages: Sequence[float]) -> tuple[float, ...]:
    if len(coverages) == 0:
        raise ValueError("coverage is empty: give a share in (0, 1], or several")
    for coverage in coverages:
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must be a share in (0, 1], got {coverage}")
    return tuple(float(coverage) for coverage in coverages)


@partial(jax.jit, static_argnames=("layout", "coverages", "axis"))
def _search(
    maps: Float[Array, "maps _ _ P"],
    cols: Int32[Array, " W"] | Int32[np.ndarray, " W"],
    layout: TokenLayout,
    coverages: tuple[float, ...],
    axis: int,
) -> Int32[Array, "maps W Q R 4"]:
    """All windows, in chunks that suit the device; layers of a model share one trace.

    `axis` is that of the columns in a map, 0 or 1; the rows of the grid have the other.
    """
    # A CPU wants chunks that stay in its cache, an accelerator enough lanes to fill it. Not
    # `lax.platform_dependent`, which traces the search for both.
    at_once = jax.default_backend() != "cpu"
    chunk_bytes = 2**28 if at_once else 4 * 2**20
    return _windows_of_maps(maps, jnp.asarray(cols), layout, coverages, axis, chunk_bytes, at_once)


def _windows_of_maps(
    maps: Float[Array, "maps _ _ P"],
    cols: Int32[Array, " W"],
    layout: TokenLayout,
    coverages: tuple[float, ...],
    axis: int,
    chunk_bytes: int,
    at_once: bool,
) -> Int32[Array, "maps W Q R 4"]:
    """All windows of all maps, one chunk of maps after the other."""
    lanes = math.comb(layout.rows + 2, 3)
    map_bytes = 4 * (3 * lanes * (layout.cols + 1) + math.prod(maps.shape[1:]))
    chunks = max(1, math.ceil(len(maps) / max(1, chunk_bytes // map_bytes)))
    size = math.ceil(len(maps) / chunks)
    last = len(maps) - size

    def chunk(index: Array) -> Array:
        # The last chunk starts early enough to be full: its first maps are done twice.
        of_chunk = lax.dynamic_slice_in_dim(maps, jnp.minimum(index * size, last), size)
        if at_once:
            return _windows_at_once(of_chunk, cols, layout, coverages, axis)
        search = partial(_windows_of_map, cols=cols, layout=layout, coverages=coverages, axis=axis)
        return jax.vmap(search)(of_chunk)

    windows = lax.map(chunk, jnp.arange(chunks, dtype=jnp.int32))
    done = (chunks - 1) * size
    first = windows[:-1].reshape(done, *windows.shape[2:])
    return jnp.concatenate([first, windows[-1, done - last :]])


class _Bands:
    """Index tables of the lanes: every (query row, top, bottom) with `top <= row < bottom`, sorted.

    `lane[r, s]` lists the lanes of query row `r`, padded by repeating its last lane, so that a
    minimum or maximum over `s` needs no mask.
    """

    def __init__(self, rows: int) -> None:
        row, top, bottom = np.mgrid[:rows, :rows, : rows + 1].reshape(3, -1)
        held = (top <= row) & (row < bottom)
        row, top, bottom = row[held], top[held], bottom[held]
        count = (np.arange(rows) + 1) * (rows - np.arange(rows))
        first = np.cumsum(count) - count
        slot = np.minimum(np.arange(count.max()), count[:, None] - 1)
        self.upper = row * (rows + 1) + top  # where a lane's two prefix sums lie in [R, R + 1]
        self.lower = row * (rows + 1) + bottom
        self.lane = first[:, None] + slot
        self.top, self.height = top[self.lane], (bottom - top)[self.lane]
        self.first = first  # the first lane of a query row, and its number of bottoms: the lanes of
        self.bottoms = rows - np.arange(rows)  # one top follow one another, bottom row + 1 first.


def _windows_of_map(
    indicator: Float[Array, "_ _ P"],
    cols: Int32[Array, " W"],
    layout: TokenLayout,
    coverages: tuple[float, ...],
    axis: int,
) -> Int32[Array, "W Q R 4"]:
    """All windows of one map, one column of queries after the other."""
    bands = _Bands(layout.rows)

    def column(place: Array) -> Array:
        of_column = lax.dynamic_index_in_dim(indicator, place, axis, keepdims=False)
        prefix, total = _prefix_sums(of_column, layout)
        band = prefix[:, bands.lower] - prefix[:, bands.upper]
        heaviest = _heaviest_boxes(band, cols[place])
        return _pick(band, heaviest, total, cols[place], bands, coverages, False)

    return lax.map(column, jnp.arange(len(cols), dtype=jnp.int32))


def _windows_at_once(
    maps: Float[Array, "maps _ _ P"],
    cols: Int32[Array, " W"],
    layout: TokenLayout,
    coverages: tuple[float, ...],
    axis: int,
) -> Int32[Array, "maps W Q R 4"]:
    """`_windows_of_map` of several, without loops whose length depends on what is found.

    At each step of such a loop a GPU waits for the host. Maps are the last axis of all large
    arrays, which its threads go along.
    """
    bands = _Bands(layout.rows)

    def column(place: Array) -> Array:
        of_column = lax.dynamic_index_in_dim(maps, place, axis + 1, keepdims=False)
        sums = jax.vmap(lambda one: _prefix_sums(one, layout), out_axes=-1)
        prefix, total = sums(of_column)
        band = prefix[:, bands.lower] - prefix[:, bands.upper]
        heaviest = _heaviest_of_all(band, cols[place])
        pick = partial(_pick, col=cols[place], bands=bands, coverages=coverages, at_once=True)
        return jax.vmap(pick, in_axes=-1)(band, heaviest, total)

    found = lax.map(column, jnp.arange(len(cols), dtype=jnp.int32))
    return jnp.moveaxis(found, 0, 1)


def _prefix_sums(
    of_column: Float[Array, "R P"], layout: TokenLayout
) -> tuple[Float[Array, "K lines"], Float[Array, " R"]]:
    """Mass left of each column and above each row, for each query of a column; and of the rows."""
    rows, cols = layout.rows, layout.cols
    above, before = (np.tri(n + 1, n, -1, dtype=np.float32) for n in (rows, cols))
    grid = unit_rows(of_column)[0].reshape(rows, rows, cols)
    exact = lax.Precision.HIGHEST
    prefix = jnp.einsum("qrc,kc,br->kqb", grid, before, above, precision=exact)
    return prefix.reshape(cols + 1, -1), prefix[-1, :, -1]


def _pick(
    band: Float[Array, "K lanes"],
    heaviest: Float[Array, "C lanes"],
    total: Float[Array, " R"],
    col: Int32[Array, ""],
    bands: _Bands,
    coverages: tuple[float, ...],
    at_once: bool,
) -> Int32[Array, "Q R 4"]:
    """The windows of each coverage."""
    # No more is demanded than the row holds: rounded sums may stay below 1, and rows of zeros have
    # their 1x1 box by this too.
    wanted = jnp.asarray(coverages, jnp.float32)[:, None] - TOLERANCE
    pick = partial(_first_smallest_box, band, heaviest, col, bands, at_once)
    return jax.vmap(pick)(jnp.minimum(wanted, total))


def _heaviest_boxes(
    band: Float[Array, "K lanes"], col: Int32[Array, ""]
) -> Float[Array, "C lanes"]:
    """The largest mass of a box of each width (1 .. C) that holds column `col`, for each band."""
    cols = band.shape[0] - 1

    def of_width(width: Array) -> Array:
        first, last = jnp.maximum(0, col - width + 1), jnp.minimum(col, cols - width)

        def lefts(step: Array, largest: Array) -> Array:
            for offset in range(_UNROLL):
                left = jnp.minimum(first + step * _UNROLL + offset, last)
                largest = jnp.maximum(largest, band[left + width] - band[left])
            return largest

        steps = (last - first + _UNROLL) // _UNROLL
        return lax.fori_loop(0, steps, lefts, band[first + width] - band[first])

    return lax.map(of_width, jnp.arange(1, cols + 1, dtype=jnp.int32))


def _heaviest_of_all(
    band: Float[Array, "K lanes maps"], col: Int32[Array, ""]
) -> Float[Array, "C lanes maps"]:
    """`_heaviest_boxes` of several maps, by one kernel, most of whose boxes count for nothing."""
    cols = band.shape[0] - 1
    lefts, widths = np.mgrid[:cols, 1 : cols + 1].astype(np.int32)
    holds = ((lefts <= col) & (col < lefts + widths))[..., None, None]
    largest = jnp.full((cols, *band.shape[1:]), -jnp.inf)
    for left in range(cols):
        mass = jnp.where(holds[left, : cols - left], band[left + 1 :] - band[left], -jnp.inf)
        filled = jnp.pad(mass, ((0, left), (0, 0), (0, 0)), constant_values=-jnp.inf)
        largest = jnp.maximum(largest, filled)
    return largest


def _first_smallest_box(
    band: Float[Array, "K lanes"],
    heaviest: Float[Array, "C lanes"],
    col: Int32[Array, ""],
    bands: _Bands,
    at_once: bool,
    threshold: Float[Array, " R"],
) -> Int32[Array, "R 4"]:
    """The window of each query of column `col`, from the largest masses of all bands and widths."""
    cols, rows = heaviest.shape[0], len(bands.first)
    widths = np.arange(1, cols + 1, dtype=np.int32)[:, None]

    # Smallest area.
    row_of_lane = np.repeat(np.arange(rows), bands.bottoms * (np.arange(rows) + 1))
    enough = heaviest >= threshold[row_of_lane]
    narrowest = jnp.where(enough, widths, 2 * rows * cols).min(axis=0)
    area = (narrowest[bands.lane] * bands.height).min(axis=1, keepdims=True)

    # Largest mass of that area, and the topmost band that has it within the tolerance.
    width = area // bands.height
    fits = (width * bands.height == area) & (width <= cols)
    mass = heaviest[jnp.minimum(width, cols) - 1, bands.lane]
    largest = jnp.where(fits, mass, -jnp.inf).max(axis=1)
    accepted = jnp.maximum(largest - TOLERANCE, threshold)[:, None]
    hit = fits & (mass >= accepted)
    top = jnp.where(hit, bands.top, rows).min(axis=1)

    # Of the bands with this top, each of another height: smallest left, then smallest bottom.
    query, nth = np.arange(rows)[:, None], np.arange(rows)
    count = bands.bottoms[:, None]
    slots = top[:, None] * count + np.minimum(nth, count - 1)  # of bottom row + 1, row + 2, ...
    tied = hit[query, slots] & (nth < count)
    lefts = np.arange(cols, dtype=np.int32)
    none = rows * cols

    def first_of(which: Array | np.ndarray) -> Array:
        """Left and bottom of the first box of some of the bands that tie, as one number."""
        slot = slots[query, which]
        lane = (bands.first[:, None] + slot)[..., None]
        rights = lefts + width[query, slot][..., None]
        mass = band[jnp.minimum(rights, cols), lane] - band[lefts, lane]
        inside = (lefts <= col) & (col < rights) & (rights <= cols)
        inside &= (mass >= accepted[..., None]) & tied[query, which][..., None]
        number = lefts * rows + (query + which)[..., None]
        return jnp.where(inside, number, none).min(axis=(1, 2))

    if at_once:
        left_bottom = first_of(np.broadcast_to(nth, (rows, rows)))
    else:
        # One band of each query a turn; rarely a second turn, as equal areas seldom have equal
        # masses.
        def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
            left_bottom, open_bands = state
            which = open_bands.argmax(axis=1, keepdims=True)  # the first that is open, if any is
            return jnp.minimum(left_bottom, first_of(which)), open_bands & (nth != which)

        start = (top * 0 + none, tied)
        left_bottom, _ = lax.while_loop(lambda state: state[1].any(), turn, start)
    left, bottom = left_bottom // rows, left_bottom % rows + 1
    right = left + area[:, 0] // (bottom - top)
    return jnp.stack([top, left, bottom, right], axis=-1).astype(jnp.int32)
