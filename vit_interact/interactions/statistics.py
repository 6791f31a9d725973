"""Statistics of a data set of any size, in fixed memory: count, mean, variance, range, histogram.

Batches are folded in by the pairwise update of Chan, Golub & LeVeque (1979): means and squared
deviations are combined, never sums of squares, so a large mean does not swallow a small variance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

Leaf = Any
"""An array; tree maps put shapes, shardings or file names in its place."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Running statistics of each element of arrays of one shape. A pytree for jit, scan, shard_map.

    Every element has its own count: entries that are masked or NaN are left out one by one.
    Infinite entries are not left out and make the mean infinite or NaN. In float32, deterministic
    for a given order of batches.

    Attributes:
      count: entries seen `[*shape]`, int32: at most 2^31 - 1 of each element.
      mean: mean `[*shape]`; 0 where nothing was seen.
      m2: sum of squared deviations from the mean `[*shape]`.
      min: smallest entry `[*shape]`; infinity where nothing was seen.
      max: largest entry `[*shape]`; minus infinity where nothing was seen.
      mean_rest: what float32 rounding left out of `mean`; without it a long run over sorted data
        would stop following the mean once one batch moves it by less than its last bit.
      edges: edges of the histogram `[E]`, or None.
      histogram: entries by bin `[*shape, E + 1]`, int32, or None. The first bin counts what is
        below the first edge and the last bin what is above the last; between them, as in
        `numpy.histogram`, a bin holds its lower edge, and the last inner one its upper edge too.
    """

    count: Leaf
    mean: Leaf
    m2: Leaf
    min: Leaf
    max: Leaf
    mean_rest: Leaf
    edges: Leaf = None
    histogram: Leaf = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        edges: Sequence[float] | Float[np.ndarray, " E"] | Float[Array, " E"] | None = None,
    ) -> Statistics:
        """Statistics of nothing yet.

        Args:
          shape: shape of one entry.
          edges: increasing edges of the histogram, two or more, or None for no histogram.

        Raises:
          ValueError: if there are fewer than two edges or they do not increase.
        """
        zeros = jnp.zeros(shape, jnp.float32)
        bins = None
        if edges is not None:
            if not isinstance(edges, jax.core.Tracer):
                edges = np.asarray(edges, np.float32)
                if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
                    raise ValueError(f"edges must be two or more increasing numbers, got {edges}")
            edges = jnp.asarray(edges)
            bins = jnp.zeros((*shape, len(edges) + 1), jnp.int32)
        return cls(
            count=jnp.zeros(shape, jnp.int32),
            mean=zeros,
            m2=zeros,
            min=jnp.full(shape, jnp.inf, jnp.float32),
            max=jnp.full(shape, -jnp.inf, jnp.float32),
            mean_rest=zeros,
            edges=edges,
            histogram=bins,
        )

    @property
    def variance(self) -> Float[Array, "*shape"]:
        """Population variance `m2 / count`; NaN where nothing was seen."""
        return jnp.where(self.count > 0, self.m2 / jnp.maximum(self.count, 1), jnp.nan)

    @jax.jit
    def update(
        self,
        x: Float[Array, " B *shape"] | Float[np.ndarray, " B *shape"],
        mask: Bool[Array, "*mask"] | Bool[np.ndarray, "*mask"] | None = None,
    ) -> Statistics:
        """Adds a batch of entries.

        Args:
          x: the entries `[B, *shape]`. NaN entries are left out.
          mask: True for what counts: `[B]` for whole entries, or `[B, *shape]` for single elements.

        Raises:
          ValueError: if `x` or `mask` has another shape.
        """
        shape = self.count.shape
        x = jnp.asarray(x, jnp.float32)
        if x.shape[1:] != shape or x.ndim != len(shape) + 1:
            raise ValueError(f"x has shape {x.shape}, expected [B, *{shape}]")
        counted = ~jnp.isnan(x)
        if mask is not None:
            if np.shape(mask) not in (x.shape[:1], x.shape):
                raise ValueError(
                    f"mask has shape {np.shape(mask)}, expected {x.shape[:1]} or {x.shape}"
                )
            mask = jnp.asarray(mask)
            counted &= mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return self.merge(self._of_batch(x, counted))

    @jax.jit
    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both together, as if all entries had been seen by one.

        Raises:
          ValueError: if shapes or histograms do not match. The edges themselves are not compared.
        """
        shapes = [jax.tree.map(jnp.shape, (s.count, s.histogram)) for s in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"only statistics of the same shape and bins can be merged, got {shapes[0]} "
                f"and {shapes[1]}"
            )
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        delta = (other.mean - self.mean) + (other.mean_rest - self.mean_rest)
        mean, rest = _two_sum(self.mean, self.mean_rest + delta * share)
        return Statistics(
            count=count,
            mean=mean,
            m2=self.m2 + other.m2 + delta**2 * share * self.count,
            min=jnp.minimum(self.min, other.min),
            max=jnp.maximum(self.max, other.max),
            mean_rest=rest,
            edges=self.edges,
            histogram=None if self.histogram is None else self.histogram + other.histogram,
        )

    def all_reduce(self, axis_name: str | tuple[str, ...]) -> Statistics:
        """Merges the statistics of all devices along a mesh axis; all get the same result.

        For use inside `jax.shard_map` or `jax.vmap`. Chan's merge for any number of parts: each
        part adds its own squared deviations and its count times the squared distance of its mean to
        the common mean. Start from `empty` on each device, not from a state that all already share:
        that one would be counted once a device.

        Args:
          axis_name: name or names of the mesh axes to merge over.
        """
        count = lax.psum(self.count, axis_name)
        # Means are compared with one of theirs, so that their sum does not round away what differs.
        pivot = lax.pmin(jnp.where(self.count > 0, self.mean, jnp.inf), axis_name)
        pivot = jnp.where(count > 0, pivot, 0.0)
        offset = jnp.where(self.count > 0, (self.mean - pivot) + self.mean_rest, 0.0)
        shift = lax.psum(offset * self.count, axis_name) / jnp.maximum(count, 1)
        mean, rest = _two_sum(pivot, shift)
        bins = None if self.histogram is None else lax.psum(self.histogram, axis_name)
        return Statistics(
            count=count,
            mean=mean,
            m2=lax.psum(self.m2 + self.count * (offset - shift) ** 2, axis_name),
            min=lax.pmin(self.min, axis_name),
            max=lax.pmax(self.max, axis_name),
            mean_rest=rest,
            edges=self.edges,
            histogram=bins,
        )

    def _of_batch(
        self, x: Float[Array, " B *shape"], counted: Bool[Array, " B *shape"]
    ) -> Statistics:
        count = counted.sum(axis=0, dtype=jnp.int32)
        low = jnp.where(counted, x, jnp.inf).min(axis=0, initial=jnp.inf)
        high = jnp.where(counted, x, -jnp.inf).max(axis=0, initial=-jnp.inf)
        # Deviations from an entry of the batch first: exact where the entries are close together.
        pivot = jnp.where(count > 0, low, 0.0)
        offset = jnp.where(counted, x - pivot, 0.0)
        shift = offset.sum(axis=0) / jnp.maximum(count, 1)
        mean, rest = _two_sum(pivot, shift)
        m2 = jnp.where(counted, (offset - shift) ** 2, 0.0).sum(axis=0)
        bins = None
        if self.histogram is not None:
            bins = _histogram(x, counted, count, self.edges)
        return Statistics(count, mean, m2, low, high, rest, self.edges, bins)


def _histogram(
    x: Float[Array, " B *shape"],
    counted: Bool[Array, " B *shape"],
    count: Int32[Array, "*shape"],
    edges: Float[Array, " E"],
) -> Int32[Array, "*shape bins"]:
    """Entries by bin, from how many lie at or above each edge: no one-hot array is built."""

    def at_or_above(edge: Array) -> Array:
        return (counted & (x >= edge)).sum(axis=0, dtype=jnp.int32)

    # Above the last edge instead of at or above it: the last inner bin holds its upper edge.
    beyond = (counted & (x > edges[-1])).sum(axis=0, dtype=jnp.int32)
    reached = jnp.concatenate(
        [count[None], lax.map(at_or_above, edges[:-1]), beyond[None], jnp.zeros_like(count)[None]]
    )
    return jnp.moveaxis(reached[:-1] - reached[1:], 0, -1)


def _two_sum(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The rounded sum and exactly what rounding left out (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
