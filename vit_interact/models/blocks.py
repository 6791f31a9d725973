"""Blocks of queries: taken out of arrays, worked on one after the other, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from vit_interact.models.cpu import on_cpu


class Summed(NamedTuple):
    """Marks what a reduction adds up over queries: blocks are added, not put side by side."""

    total: Array


def pick(array: Array | None, numbers: np.ndarray, axis: int, once: bool = False) -> Array | None:
    """The tokens of each block, blocks first; with `once`, zeros where a token comes again."""
    if array is None:
        return None
    picked = jnp.take(array, numbers.reshape(-1), axis=axis)
    first = np.zeros(numbers.size, bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    if once and not first.all():
        picked = jnp.where(first.reshape(-1, *(1,) * (array.ndim - axis - 1)), picked, 0)
    shape = (*array.shape[:axis], *numbers.shape, *array.shape[axis + 1 :])
    return jnp.moveaxis(picked.reshape(shape), axis, 0)


def map_blocks(function: Callable[[Any], Any], xs: Any, like: Array) -> Any:
    """`lax.map`, but that `Summed` results are added up; on a CPU with less memory.

    `lax.map` writes results over constant zeros. XLA's CPU compiler copies those for all layers of
    a model ahead of time: three quarters of the temporary memory of `attention` at 518 pixels. So
    they are written over some number of `like` there, and sums begin at a zero made of it.
    """
    if not on_cpu() or not like.size:
        found = lax.map(function, xs)
        return jax.tree.map(
            lambda one: Summed(one.total.sum(axis=0)) if isinstance(one, Summed) else one,
            found, is_leaf=_is_sum,
        )  # fmt: skip
    made = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
    count = len(jax.tree.leaves(xs)[0])
    some = lax.stop_gradient(like[(0,) * like.ndim])
    zero = jnp.minimum(jnp.abs(some), 0)

    def begin(one: Any) -> Any:
        if isinstance(one, Summed):
            return Summed(jnp.broadcast_to(zero.astype(one.total.dtype), one.total.shape))
        return jnp.broadcast_to(some.astype(one.dtype), (count, *one.shape))

    def step(found: Any, index_and_x: tuple[Array, Any]) -> tuple[Any, None]:
        index, x = index_and_x

        def put(whole: Any, one: Any) -> Any:
            if isinstance(one, Summed):
                return Summed(whole.total + one.total)
            return lax.dynamic_update_index_in_dim(whole, one, index, 0)

        return jax.tree.map(put, found, function(x), is_leaf=_is_sum), None

    start = jax.tree.map(begin, made, is_leaf=_is_sum)
    return lax.scan(step, start, (jnp.arange(count), xs))[0]


def _is_sum(one: Any) -> bool:
    return isinstance(one, Summed)


def join(
    found: list[dict[str, Any]], groups: tuple[np.ndarray, ...], axis: int, once: bool = False
) -> dict[str, Array]:
    """Puts blocks together: in the order of tokens, or added up.

    `once`: queries that come again add nothing to sums.
    """
    joined = {}
    for name in {name: None for part in found for name in part}:
        having = [(part[name], g) for part, g in zip(found, groups, strict=True) if name in part]
        numbers = np.concatenate([g.reshape(-1) for _, g in having])
        order = np.unique(numbers, return_index=True)[1]
        if isinstance(having[0][0], Summed):
            if len(order) != len(numbers) and not once:
                raise ValueError("blocks that share queries cannot be added up")
            joined[name] = sum(part.total for part, _ in having)
            continue
        flat = [
            jnp.moveaxis(part, 0, axis).reshape(
                *part.shape[1 : axis + 1], -1, *part.shape[axis + 2 :]
            )
            for part, _ in having
        ]
        rows = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=axis)
        joined[name] = _in_order(rows, order, axis)
    return joined


def _in_order(rows: Array, order: np.ndarray, axis: int) -> Array:
    """`jnp.take(rows, order, axis)`, by slices where the order is but a few runs."""
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    if len(runs) > 3:
        return jnp.take(rows, order, axis=axis)
    slices = [lax.slice_in_dim(rows, run[0], run[-1] + 1, axis=axis) for run in runs]
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=axis)
