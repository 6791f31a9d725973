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


def pick(array: Array | None, numbers: np.ndarray, axis: int) -> Array | None:
    """The tokens of each block, blocks first."""
    if array is None:
        return None
    picked = jnp.take(array, numbers.reshape(-1), axis=axis)
    shape = (*array.shape[:axis], *numbers.shape, *array.shape[axis + 1 :])
    return jnp.moveaxis(picked.reshape(shape), axis, 0)


def map_blocks(function: Callable[[Any], Any], xs: Any, like: Array) -> Any:
    """`lax.map`; on a CPU its results are written over some number of `like`.

    `lax.map` writes them over constant zeros. XLA's CPU compiler copies those for all layers of a
    model ahead of time: three quarters of the temporary memory of `attention` at 518 pixels.
    """
    if not on_cpu() or not like.size:
        return lax.map(function, xs)
    made = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
    count = len(jax.tree.leaves(xs)[0])
    some = lax.stop_gradient(like[(0,) * like.ndim])
    start = jax.tree.map(
        lambda one: jnp.broadcast_to(some.astype(one.dtype), (count, *one.shape)), made
    )

    def step(found: Any, index_and_x: tuple[Array, Any]) -> tuple[Any, None]:
        index, x = index_and_x
        put = lambda whole, one: lax.dynamic_update_index_in_dim(whole, one, index, 0)  # noqa: E731
        return jax.tree.map(put, found, function(x)), None

    return lax.scan(step, start, (jnp.arange(count), xs))[0]


def join(
    found: list[dict[str, Any]], groups: tuple[np.ndarray, ...], axis: int
) -> dict[str, Array]:
    """Puts blocks together: in the order of tokens, or added up."""
    joined = {}
    for name in {name: None for part in found for name in part}:
        having = [(part[name], g) for part, g in zip(found, groups, strict=True) if name in part]
        numbers = np.concatenate([g.reshape(-1) for _, g in having])
        order = np.unique(numbers, return_index=True)[1]
        if isinstance(having[0][0], Summed):
            if len(order) != len(numbers):
                raise ValueError("blocks that share queries cannot be added up")
            joined[name] = sum(part.total.sum(axis=0) for part, _ in having)
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
