"""Attention that makes the weights of few heads at a time, for XLA's CPU.

Heads do not depend on one another, and most indicators are sums over them
(`interactions/head_terms.py`). So `[M, N]` for a head or two is all that exists of the weights. In
the memory that blocks of queries of all heads would take, there are many more queries to a block,
and products of many rows are faster (docs/kernels.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vit_interact.interactions.by_head import is_single
from vit_interact.interactions.head_terms import Head
from vit_interact.models.blocks import Places, Summed, map_blocks
from vit_interact.models.narrow import contract
from vit_interact.models.softmax import (
    Rows,
    attention_logits,
    exponentials_of,
    softmax_of,
    softmax_rows,
    without_batch,
)

OfHead = Callable[[Head], dict[str, Array]]

_OUTPUT, _SIDES = "output", ("dquery", "dkey", "dvalue")
# Weights of a head from which on product, maximum and exponentials are faster one after the other
# than in YNNPACK's loop over rows: more than stay in the cache (docs/performance.md).
_APART = 2**19


@runtime_checkable
class OverHeads(Protocol):
    """A reduction of attention that adds up what heads give."""

    def of_head(self, head: Head) -> dict[str, Array]:
        """What one head adds, or what each of a few along the first axis does: `[..., M, N]`."""
        ...

    def finish(
        self, totals: dict[str, Array], heads: int, queries: Any, prefix: bool
    ) -> dict[str, Any]:
        """What the reduction gives, of the sums over all heads; queries as in `Attended`."""
        ...


def attend_over_heads(
    inputs: tuple[Any, ...], at_a_time: int, of_head: OfHead | None = None, keep: bool = False
) -> tuple[Float[Array, "*B M H K"], dict[str, Array]]:
    """The output of some queries, and sums over heads.

    Args:
      inputs: `(query, key, value, mask, out_kernel)` as `attend.explicit_attention` takes them.
      at_a_time: heads worked on together; it divides the number of heads.
      of_head: what heads add; None for the output alone.
      keep: whether to give rows of the softmax, too, by their names `[*B, M, H, 1]`.
    """
    query, key, value, mask, out_kernel = inputs
    if is_single(batch := query.shape[:-3]):
        one = (*without_batch(query, key, value, mask), out_kernel)
        return _with_batch(batch, attend_over_heads(one, at_a_time, of_head, keep))
    take = _Take(at_a_time, batch)

    def some(first: Array) -> dict[str, Any]:
        q, k, v = (take.heads(array, first) for array in (query, key, value))
        rows = take.mask(mask, first)
        exponentials, highest = exponentials_of(attention_logits(q, k, None, rows), rows)
        large = math.prod(exponentials.shape[-2:]) > _APART
        sums = large and v.dtype == exponentials.dtype
        each = jnp.einsum(
            "...ij,...jk->...ik",
            exponentials.astype(v.dtype),
            _with_ones(v) if sums else v,
            preferred_element_type=exponentials.dtype,
        )
        each, total = each[..., : v.shape[-1]], each[..., v.shape[-1] : v.shape[-1] + 1]
        if not sums:
            total = jnp.sum(exponentials, axis=-1, keepdims=True)
        known = softmax_rows(highest, total, rows)
        share = known.largest
        if large:
            # Reads the rows' maximum for itself: YNNPACK leaves the product before it alone then.
            share = jnp.where(jnp.isnan(known.log_sum), known.log_sum, share)
        output = share * each
        found = {_OUTPUT: take.back(output.astype(v.dtype))}
        if keep:
            found |= {name: take.back(each) for name, each in known._asdict().items()}
        if of_head is None:
            return found
        values = v.astype(exponentials.dtype)
        head = Head(exponentials, share, share, values, output, take.kernel(out_kernel, first))
        return found | take.sums(of_head(head))

    found = _over_heads(some, query, at_a_time)
    return found.pop(_OUTPUT), found


def _with_ones(value: Float[Array, "*heads N K"]) -> Float[Array, "*heads N _"]:
    """Values with a one for each key, so that their product with exponentials has the sums, too.

    And zeros to a multiple of 16: XLA's CPU multiplies large matrices with 80 columns in 0.75 to
    0.9 of the time of 64 (docs/performance.md).
    """
    *lead, width = value.shape
    ones = jnp.ones((*lead, 1), value.dtype)
    zeros = jnp.zeros((*lead, 15 - width % 16), value.dtype)
    return jnp.concatenate([value, ones, zeros], axis=-1)


def gradients_over_heads(
    inputs: tuple[Any, ...],
    grad: Float[Array, "*B M H K"],
    output: Float[Array, "*B M H K"],
    rows: Rows | None,
    at_a_time: int,
    of_head: OfHead,
) -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
    """Derivatives of a score by query, key and value, and sums over heads.

    As `attend_backward.attention_gradients`, which it is tested against.

    Args:
      inputs: as for `attend_over_heads`.
      grad: derivative of the score by the output.
      output: of the queries.
      rows: of their softmax `[*B, M, H, 1]`, if known.
      at_a_time: as for `attend_over_heads`.
      of_head: what heads add.
    """
    query, key, value, mask, out_kernel = inputs
    if is_single(batch := query.shape[:-3]):
        one = (*without_batch(query, key, value, mask), out_kernel)
        g, out = without_batch(grad, output)
        known = rows and Rows(*without_batch(*rows))
        return _with_batch(batch, gradients_over_heads(one, g, out, known, at_a_time, of_head))
    take = _Take(at_a_time, batch)
    alongs = along_output(grad, output)

    def some(first: Array) -> dict[str, Any]:
        def of_heads(tree: Any) -> Any:
            return jax.tree.map(lambda array: take.heads(array, first), tree)

        q, k, v, o, g, known, along = map(of_heads, (query, key, value, output, grad, rows, alongs))
        masks = take.mask(mask, first)
        weights, known = softmax_of(attention_logits(q, k, None, masks), masks, known)
        sides, logit_grad, along = gradients_of_rows(weights, q, k, v, g, along)
        values, o = v.astype(weights.dtype), o.astype(weights.dtype)
        kernel = take.kernel(out_kernel, first)
        head = Head(weights, None, known.largest, values, o, kernel, logit_grad, along)
        made = {name: take.back(side) for name, side in zip(_SIDES, sides, strict=True)}
        return made | take.sums(of_head(head))

    found = _over_heads(some, query, at_a_time)
    dquery, dkey, dvalue = (found.pop(name) for name in _SIDES)
    return (dquery, dkey, dvalue), found


def gradients_of_rows(
    weights: Float[Array, "*heads M N"],
    query: Float[Array, "*heads M K"],
    key: Float[Array, "*heads N K"],
    value: Float[Array, "*heads N K"],
    grad: Float[Array, "*heads M K"],
    along: Float[Array, "*heads M 1"] | None,
) -> tuple[tuple[Array, Array, Array], Float[Array, "*heads M N"], Float[Array, "*heads M 1"]]:
    """Derivatives by query, key and value, by the logits, and `g · o` of each query.

    As derived from the softmax, with `along_output` where that is known.
    """
    slope = jnp.einsum("...ik,...jk->...ij", grad, value, preferred_element_type=weights.dtype)
    if along is None:
        along = jnp.sum(weights * slope, axis=-1, keepdims=True)
    dlogits = weights * (slope - along)
    # Products in the type of the layer, as XLA would derive them.
    narrow = dlogits.astype(value.dtype)
    dquery = contract("...ij,...jk->...ik", narrow, key)
    dkey = contract("...ij,...ik->...jk", narrow, query)
    dvalue = contract("...ij,...ik->...jk", weights.astype(grad.dtype), grad)
    return (dquery, dkey, dvalue), dlogits, along


def along_output(
    grad: Float[Array, "*B M H K"], output: Float[Array, "*B M H K"]
) -> Float[Array, "*B M H 1"] | None:
    """`g · o` of each query: `sum_j A_ij dA_ij` by a head's channels and not by all keys.

    From Dao et al. 2022. None where the output is narrower than weights are: it would be as rough.
    Of all heads at once: YNNPACK would write a head's once for each key.
    """
    if output.dtype != jnp.promote_types(output.dtype, jnp.float32):
        return None
    return jnp.sum(grad * output, axis=-1, keepdims=True)


def _over_heads(
    some: Callable[[Array], dict[str, Any]], query: Array, at_a_time: int
) -> dict[str, Any]:
    """Runs `some` from each first head on, and puts heads side by side or adds them up."""
    heads = query.shape[-2]
    places = Places.of(np.arange(heads).reshape(-1, at_a_time))
    # Without this, a derivative would keep the weights of all heads.
    step = jax.checkpoint(some, prevent_cse=False)
    first = jnp.arange(0, heads, at_a_time)
    found = map_blocks(step, first, places, query.ndim - 2, query)
    return {n: one.total if isinstance(one, Summed) else one for n, one in found.items()}


def _with_batch(batch: tuple[int, ...], tree: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape), tree)


class _Take:
    """Picks heads out of arrays: one without its axis, several with it in front."""

    def __init__(self, count: int, batch: tuple[int, ...]) -> None:
        self.count, self.batch = count, batch

    def _axis(self, array: Array, first: Array, axis: int) -> Array:
        axis %= array.ndim
        if self.count == 1:
            return lax.dynamic_index_in_dim(array, first, axis, keepdims=False)
        return jnp.moveaxis(lax.dynamic_slice_in_dim(array, first, self.count, axis), axis, 0)

    def heads(self, array: Float[Array, "*B N H K"], first: Array) -> Float[Array, "*heads N K"]:
        return self._axis(array, first, -2)

    def mask(self, mask: Array | None, first: Array) -> Array | None:
        if mask is None or mask.ndim < 3:
            return mask
        return mask.squeeze(-3) if mask.shape[-3] == 1 else self._axis(mask, first, -3)

    def kernel(self, kernel: Array | None, first: Array) -> Array | None:
        if kernel is None or self.count == 1:
            return None if kernel is None else self._axis(kernel, first, 0)
        picked = self._axis(kernel, first, 0)
        return picked.reshape(self.count, *(1,) * len(self.batch), *kernel.shape[1:])

    def back(self, array: Float[Array, "*heads N K"]) -> Float[Array, "*B N H K"]:
        return jnp.expand_dims(array, -2) if self.count == 1 else jnp.moveaxis(array, 0, -2)

    def sums(self, maps: dict[str, Array]) -> dict[str, Summed]:
        if self.count == 1:
            return {name: Summed(each) for name, each in maps.items()}
        return {name: Summed(functools.reduce(jnp.add, each)) for name, each in maps.items()}
