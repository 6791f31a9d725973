"""The indicators' formulas on one tile of a map, for the Pallas kernels of GPUs and of TPUs.

They are those of `interactions/indicators.py`. A row's largest key is always apart: the weights of
the others are at most a half, so that `A/(1−A)` is exact, and what cutting the largest one changes
comes from the others alone (`head_terms.cut_dominant`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LOG2_E = 1.4426950408889634
LOWEST = -1e30  # Finite: inf - inf would be NaN.

LOG, WHICH, REST = range(3)
"""Columns of a row's statistics: base-2 logarithm of the sum of `exp(logit)`; number of the key
with the largest logit; sum of `exp(logit - largest)` over the other keys."""

OWN, DOMINANT = range(2)
"""Columns of a map's statistics: what a row adds to every edge; its value at the key `WHICH`."""

OfHead = Callable[[Any], Array]


class MapSides(NamedTuple):
    """What a map is made from.

    Attributes:
      query: of the rows, scaled, `[B, M, H, K]`.
      key: of the columns, `[B, N, H, K]`.
      rows: statistics of the rows `[B, H, M, 1 or 3]`.
      left: of the rows, multiplied with every value: `o M` of `leave_one_out`, or the gradient;
        float32 or in the type of the values.
      value: of the columns, `[B, N, H, K]`.
      ends: `[B, H, M, 2]`, columns `OWN` and `DOMINANT`.
      own: `[B, H, 1, N]`, what a key adds to every edge.
    """

    query: Any
    key: Any
    rows: Any
    left: Any = None
    value: Any = None
    ends: Any = None
    own: Any = None

    def map(self, **functions: Callable[[Any], Any]) -> MapSides:
        """With functions applied to some arrays, but for those that are None."""
        changed = {name: getattr(self, name) for name in functions}
        return self._replace(
            **{n: array if array is None else functions[n](array) for n, array in changed.items()}
        )


class Tile(NamedTuple):
    """One tile `[M, N]` of a map; functions of a head's number give what belongs to that head.

    Attributes:
      numbers: of the keys, `[M, N]`.
      exp2: the platform's.
      logits: `[M, N]`, float32.
      rows: column of the rows' statistics, `[M, 1]`.
      ends: column of the map's statistics, `[M, 1]`.
      cross: `left` of the queries times the values, `[M, N]`.
      own: what a key adds to every edge, `[1, N]`.
    """

    numbers: Array
    exp2: Callable[[Array], Array]
    logits: OfHead
    rows: Callable[[Any, int], Array]
    ends: Callable[[Any, int], Array]
    cross: OfHead
    own: OfHead

    def below(self, h: Any) -> Array:
        """By how many powers of two a key is less than all together."""
        return self.rows(h, LOG) - self.logits(h) * LOG2_E

    def weights(self, h: Any) -> Array:
        """Attention."""
        return self.exp2(-self.below(h))

    def cut(self, h: Any) -> tuple[Array, Array]:
        """`A/(1-A)`, anything at the row's largest key, and where that is."""
        dominates = self.numbers == self.rows(h, WHICH).astype(jnp.int32)
        return 1.0 / (self.exp2(self.below(h)) - 1.0), dominates


# Each of these gives what adds a head to a tile, how many tiles that needs, and what ends the sum.


def _attention(heads: int, tile: Tile) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        return (carry[0] + tile.weights(h),)

    return add_head, 1, lambda total: total * (1 / heads)


def _dispersion(heads: int, tile: Tile) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # Welford's update: a difference of two sums would cancel.
        mean, squares = carry
        new = tile.weights(h)
        above = new - mean
        mean = mean + above / (h + 1).astype(jnp.float32)
        return mean, squares + above * (new - mean)

    return add_head, 2, lambda mean, squares: jnp.sqrt(jnp.maximum(squares, 0.0) / heads)


def _gradient(heads: int, tile: Tile) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        return (carry[0] + jnp.maximum(tile.weights(h) * tile.cross(h), 0.0),)

    return add_head, 1, lambda total: total * (1 / heads)


def _leave_one_out(heads: int, tile: Tile) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        factor, dominates = tile.cut(h)
        distance = jnp.maximum(tile.ends(h, OWN) - 2.0 * tile.cross(h) + tile.own(h), 0.0)
        change = jnp.where(dominates, tile.ends(h, DOMINANT), factor * factor * distance)
        return (carry[0] + change,)

    return add_head, 1, jnp.sqrt


def _edge(heads: int, tile: Tile) -> tuple[Any, ...]:
    def add_head(h: Any, carry: tuple[Array]) -> tuple[Array]:
        factor, dominates = tile.cut(h)
        change = factor * (tile.ends(h, OWN) - tile.cross(h))
        return (carry[0] + jnp.where(dominates, tile.ends(h, DOMINANT), change),)

    return add_head, 1, jnp.abs


MAPS: dict[str, Callable[[int, Tile], tuple[Any, ...]]] = {
    "attention": _attention,
    "dispersion": _dispersion,
    "gradient": _gradient,
    "leave_one_out": _leave_one_out,
    "edge": _edge,
}
CUTS = ("leave_one_out", "edge")


def whole_tile(name: str, heads: int, tile: Tile) -> Array:
    """The tile's part of the map of indicator `name`."""
    add_head, start, finish = MAPS[name](heads, tile)
    zeros = jnp.zeros(tile.numbers.shape, jnp.float32)
    return finish(*lax.fori_loop(0, heads, add_head, (zeros,) * start))


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


def halves(array: Array, dtype: Any, in_kernel: bool = False) -> tuple[Array, ...]:
    """Arrays of a type that add up to a float32 array, so that a tensor core can multiply it.

    Outside of a kernel, XLA takes a conversion to a narrow type and back for none at all, and finds
    that the second half is zero; inside, there is no such operation as `reduce_precision`.
    """
    if array.dtype == dtype:
        return (array,)
    if in_kernel:
        high = array.astype(dtype).astype(jnp.float32)
    else:
        narrow = jnp.finfo(dtype)
        high = lax.reduce_precision(array, narrow.nexp, narrow.nmant)
    return high.astype(dtype), (array - high).astype(dtype)


def pad_width(array: Array) -> Array:
    """Width of a head up to a power of two that a tensor core takes; zeros add nothing."""
    return pad_to(array, -1, max(16, 1 << (array.shape[-1] - 1).bit_length()))


def pad_to(array: Array, axis: int, size: int) -> Array:
    """Zeros behind `axis`, up to a size."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, max(0, size - array.shape[axis]))
    return jnp.pad(array, padding)
