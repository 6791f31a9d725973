"""Blocks of queries, heads or images: worked on one after the other, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


class Summed(NamedTuple):
    """Marks what a reduction adds up over queries: blocks are added, not put side by side."""

    total: Array


class Layers(NamedTuple):
    """Arrays that `map_blocks` writes one behind the other along a new first axis.

    Stacked by whoever makes them, they would exist twice.
    """

    each: tuple[Array, ...]


class Places(NamedTuple):
    """Where rows of blocks of one size come from, and where they go.

    Attributes:
      numbers: tokens of each block, `[blocks, M]`.
      starts: first row of each block in the result; a later block is written over an earlier one.
      length: rows of the result.
      order: the tokens in it.
    """

    numbers: np.ndarray
    starts: np.ndarray
    length: int
    order: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray) -> Places:
        """Neighbours go where they belong at once, others one block behind the other."""
        count, size = numbers.shape
        first = numbers[:, :1]
        if (numbers == first + np.arange(size)).all():
            order = np.arange(numbers.min(), numbers.max() + 1)
            return cls(numbers, numbers[:, 0] - order[0], len(order), order)
        return cls(numbers, size * np.arange(count), numbers.size, numbers.reshape(-1))


def pick(array: Array | None, numbers: np.ndarray, axis: int, once: bool = False) -> Array | None:
    """The tokens of each block, blocks first; with `once`, zeros where one comes again later."""
    if array is None:
        return None
    picked = jnp.take(array, numbers.reshape(-1), axis=axis)
    last = np.zeros(numbers.size, bool)
    last[numbers.size - 1 - np.unique(numbers.reshape(-1)[::-1], return_index=True)[1]] = True
    if once and not last.all():
        picked = jnp.where(last.reshape(-1, *(1,) * (array.ndim - axis - 1)), picked, 0)
    shape = (*array.shape[:axis], *numbers.shape, *array.shape[axis + 1 :])
    return jnp.moveaxis(picked.reshape(shape), axis, 0)


def map_blocks(
    function: Callable[[Any], dict[str, Any]],
    xs: Any,
    places: Places,
    axis: int | Mapping[str, int],
    like: Array,
    once: bool = False,
) -> dict[str, Any]:
    """Rows of all blocks from a function of one; `Summed` ones are added up.

    Rows are written where they belong, so that no second copy of them exists. They go over some
    number of `like`: XLA's CPU compiler would copy constant zeros for all layers of a model ahead
    of time (three quarters of the temporary memory of `attention` at 518 pixels).

    Args:
      function: of one block's part of `xs`; gives arrays with their rows at `axis`, `Summed` ones,
        and `Layers` whose rows are at `axis` of the result.
      xs: blocks at axis 0.
      places: of the rows.
      axis: of the rows, for all arrays or by name.
      like: any array that depends on the inputs as the results do.
      once: whether queries that come again add nothing to sums.

    Raises:
      ValueError: for sums over blocks that share queries.
    """
    made = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
    repeated = len(np.unique(places.numbers)) < places.numbers.size
    if repeated and not once and any(isinstance(one, Summed) for one in made.values()):
        raise ValueError("blocks that share queries cannot be added up")
    some = lax.stop_gradient(like[(0,) * like.ndim]) if like.size else jnp.zeros((), like.dtype)
    some = jnp.where(jnp.isfinite(some), some, 0)

    axes = axis if isinstance(axis, Mapping) else dict.fromkeys(made, axis)

    def begin(one: Any, axis: int) -> Any:
        if isinstance(one, Summed):
            zero = jnp.minimum(jnp.abs(some), 0).astype(one.total.dtype)
            return Summed(jnp.broadcast_to(zero, one.total.shape))
        if isinstance(one, Layers):
            one = jax.ShapeDtypeStruct((len(one.each), *one.each[0].shape), one.each[0].dtype)
        shape = (*one.shape[:axis], places.length, *one.shape[axis + 1 :])
        return jnp.broadcast_to(some.astype(one.dtype), shape)

    def step(found: dict[str, Any], block: tuple[Array, Any]) -> tuple[dict[str, Any], None]:
        start, x = block

        def put(whole: Any, one: Any, axis: int) -> Any:
            if isinstance(one, Summed):
                return Summed(whole.total + one.total)
            if isinstance(one, Layers):
                for index, layer in enumerate(one.each):
                    at: dict[int, Any] = {0: index, axis: start}
                    starts = [at.get(place, 0) for place in range(whole.ndim)]
                    whole = lax.dynamic_update_slice(whole, layer[None], starts)
                return whole
            return lax.dynamic_update_slice_in_dim(whole, one, start, axis)

        new = function(x)
        return {name: put(found[name], new[name], axes[name]) for name in found}, None

    start = {name: begin(one, axes[name]) for name, one in made.items()}
    return lax.scan(step, start, (jnp.asarray(places.starts, jnp.int32), xs))[0]


def join(found: list[dict[str, Any]], places: list[Places], axis: int) -> dict[str, Array]:
    """Puts blocks of different sizes together: in the order of tokens, or added up."""
    joined = {}
    for name in {name: None for part in found for name in part}:
        having = [(part[name], p) for part, p in zip(found, places, strict=True) if name in part]
        parts = [part for part, _ in having]
        if isinstance(parts[0], Summed):
            joined[name] = sum(part.total for part in parts)
            continue
        rows = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
        order = np.argsort(np.concatenate([p.order for _, p in having]))
        joined[name] = _in_order(rows, order, axis)
    return joined


def _in_order(rows: Array, order: np.ndarray, axis: int) -> Array:
    """`jnp.take(rows, order, axis)`, by slices where the order is but a few runs."""
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    if len(runs) > 3:
        return jnp.take(rows, order, axis=axis)
    slices = [lax.slice_in_dim(rows, run[0], run[-1] + 1, axis=axis) for run in runs]
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=axis)


def map_images(
    function: Callable[..., Any], at_a_time: int, *arrays: Array | None, axes: Any = 0
) -> Any:
    """What a function of all images gives, from some of them at a time.

    The last images start early enough to be as many, and some are then worked on twice.

    Args:
      function: of arrays of `at_a_time` images or a few less; gives any tree of arrays, and
        `Layers`, of which arrays are made.
      at_a_time: images.
      *arrays: with images at axis 0; None is passed on.
      axes: of images in what the function gives: a number, or a tree whose leaves stand for all
        below them.
    """
    given = [array for array in arrays if array is not None]
    images = len(given[0])
    count = -(-images // at_a_time)
    size = -(-images // count)
    first = np.minimum(np.arange(count) * size, images - size)
    numbers = first[:, None] + np.arange(size)

    def split(array: Array) -> Array:
        if count * size == images:
            return array.reshape(count, size, *array.shape[1:])
        return jnp.take(array, numbers, axis=0)

    def some(xs: list[Array]) -> Any:
        rest = iter(xs)
        return function(*(None if array is None else next(rest) for array in arrays))

    def is_layers(one: Any) -> bool:
        return isinstance(one, Layers)

    def leaves_of(tree: Any) -> list[Any]:
        return jax.tree.leaves(tree, is_leaf=is_layers)

    def named(xs: list[Array]) -> dict[str, Any]:
        return {str(place): leaf for place, leaf in enumerate(leaves_of(some(xs)))}

    parts = [split(array) for array in given]
    made = jax.eval_shape(some, [part[0] for part in parts])
    spread = jax.tree.map(lambda axis, below: [axis] * len(leaves_of(below)), axes, made)
    by_name = {str(place): axis for place, axis in enumerate(jax.tree.leaves(spread))}
    found = map_blocks(named, parts, Places.of(numbers), by_name, given[0])
    form = jax.tree.structure(made, is_leaf=is_layers)
    return jax.tree.unflatten(form, [found[name] for name in by_name])
