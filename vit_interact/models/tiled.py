"""Attention and indicators whose weights exist for a tile at a time, by Pallas kernels.

`attend_in_tiles` does what `attend.attend_in_blocks` does, on GPUs and TPUs with the kernels of
`models/pallas_kernels.py`, on a CPU with Pallas' interpreter, which is for tests. Derivatives take
the way of `attend_in_blocks`: outputs and maps are differentiated through blocks of queries in XLA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vit_interact.interactions.indicators import INDICATORS, NEEDS
from vit_interact.models import pallas_kernels as kernels
from vit_interact.models.attend import (
    SMALLEST_BLOCK,
    Attended,
    QueryBlocks,
    Tiles,
    attend_in_blocks,
    suitable_blocks,
)

_EXACT = lax.Precision.HIGHEST


class Tiled(NamedTuple):
    """What reductions get in place of `Attended`: no weights, but a way to each indicator.

    Attributes:
      query: `[..., M, H, K]`, scaled by `1/sqrt(K)`.
      key: `[..., N, H, K]`.
      values: `[..., N, H, K]`.
      out_kernel: `[H, K, D]`, multiplied by LayerScale where the model has it; None when unknown.
      statistics: of the rows, leading axes as one.
      tiles: their sizes.
    """

    query: Array
    key: Array
    values: Array
    out_kernel: Array | None
    statistics: kernels.Statistics
    tiles: Tiles

    def indicator(self, name: str, g: Array | None = None) -> Float[Array, "*B M N"]:
        """The map of an indicator, `g` being the gradient of the output `[..., M, H, K]`.

        Raises:
          ValueError: for an indicator that has no kernel.
        """
        if name not in kernels.MAPS:
            known = ", ".join((*kernels.MAPS, "rollout"))
            raise ValueError(f"no Pallas kernel for {name!r}; there is one for {known}")
        inputs = (self.query, self.key, self.values, self.out_kernel, g)
        found = _map(name, self.tiles, self.statistics, *lax.stop_gradient(inputs))
        return _differentiable_map(name, found, inputs)


def attend_in_tiles(
    inputs: tuple[Any, ...],
    tiles: Tiles,
    reduce: Callable[..., dict[str, Any]] | None = None,
    output_grad: Float[Array, "*B M H K"] | None = None,
) -> tuple[Float[Array, "*B M H K"], dict[str, Array]]:
    """Attention and reductions of it that never hold `[B, H, M, N]`.

    Args:
      inputs: `(query, key, value, bias, mask, out_kernel)` as `explicit_attention` takes them; bias
        and mask must be None.
      tiles: their sizes.
      reduce: maps a `Tiled`, and `output_grad` where it is given, to arrays.
      output_grad: derivative of the score by the output.

    Returns:
      The output, in the values' type, and what `reduce` gave.

    Raises:
      ValueError: for a bias or mask, or 64-bit inputs.
    """
    query, key, value, bias, mask, out_kernel = inputs
    if bias is not None or mask is not None:
        raise ValueError("Pallas kernels take no mask and no predicted windows: kernel=None")
    if jnp.promote_types(query.dtype, value.dtype) == jnp.float64:
        raise ValueError("Pallas kernels compute in float32, not in float64: kernel=None")
    statistics, output = _attend(tiles, *lax.stop_gradient((query, key, value)))
    output = _differentiable_output(output, query, key, value)
    if reduce is None:
        return output, {}
    tiled = Tiled(query, key, value, out_kernel, statistics, tiles)
    return output, reduce(tiled) if output_grad is None else reduce(tiled, output_grad)


def _attend(
    tiles: Tiles, query: Array, key: Array, value: Array
) -> tuple[kernels.Statistics, Array]:
    values, mean = _centred(value)
    found = kernels.row_statistics(
        _heads_first(query), _heads_first(key), _heads_first(values), tiles
    )
    output = _tokens_first(_whole(found, _heads_first(values)).output, query) + mean
    return found, output.astype(value.dtype)


class _Rows(NamedTuple):
    """Outputs, and their change where the key that dominates is cut (`by_head.cut_dominant`)."""

    output: Array  # [B, H, M, K]
    dominant_change: Array  # [B, H, M, K]


def _whole(statistics: kernels.Statistics, values: Float[Array, "B H N K"]) -> _Rows:
    rest, rows = statistics
    which, rest_sum = (rows[..., c : c + 1] for c in (kernels.WHICH, kernels.REST))
    some = which >= 0
    picked = jnp.maximum(which, 0).astype(jnp.int32)
    picked = jnp.take_along_axis(values, picked, axis=-2, mode="promise_in_bounds")
    largest = jnp.where(some, rows[..., kernels.SCALE :][..., :1], 0)
    largest_value = jnp.where(some, picked, 0)
    others = rest_sum > 0
    alone = jnp.where(others, rest / jnp.where(others, rest_sum, 1), largest_value)
    return _Rows(rest + largest * largest_value, largest * (alone - largest_value))


def _map(
    name: str,
    tiles: Tiles,
    statistics: kernels.Statistics,
    query: Array,
    key: Array,
    values: Array,
    out_kernel: Array | None,
    g: Array | None,
) -> Array:
    if "out_kernel" in NEEDS[name] and out_kernel is None:
        raise ValueError(f"{name} needs out_kernel, which this model's attention does not expose")
    if "output_grad" in NEEDS[name] and g is None:
        raise ValueError(f"{name} needs the gradient of the output")
    queries = kernels.QuerySide(_heads_first(query), statistics.rows)
    keys = kernels.KeySide(_heads_first(key))
    if name == "gradient":
        queries = queries._replace(left=_heads_first(_float(g)))
        keys = keys._replace(value=_heads_first(_float(values)))
    elif name in ("leave_one_out", "edge"):
        value = _heads_first(_centred(values)[0])
        rows = _whole(statistics, value)
        if name == "edge":
            left, others = _heads_first(_float(g)), (rows.output, rows.dominant_change)
            ends = [jnp.sum(left * other, axis=-1) for other in others]
            own = None
        else:
            kernel = _float(out_kernel)
            metric = jnp.einsum("hkd,hld->hkl", kernel, kernel, precision=_EXACT)
            left, value_m, change_m = (
                jnp.einsum("bhik,hkl->bhil", x, metric, precision=_EXACT)
                for x in (rows.output, value, rows.dominant_change)
            )
            ends = [
                jnp.sum(left * rows.output, axis=-1),
                jax.nn.relu(jnp.sum(change_m * rows.dominant_change, axis=-1)),
            ]
            own = jnp.sum(value_m * value, axis=-1)[..., None, :]
        queries = queries._replace(left=left, ends=jnp.stack(ends, axis=-1))
        keys = keys._replace(value=value, own=own)
    found = kernels.indicator_map(name, queries, keys, tiles)
    return found.reshape(*query.shape[:-3], *found.shape[-2:])


@jax.custom_vjp
def _differentiable_output(output: Array, query: Array, key: Array, value: Array) -> Array:
    """`output`, which a kernel made of the others, with its derivatives by them."""
    del query, key, value
    return output


def _output_fwd(output: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return output, inputs


def _output_bwd(inputs: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    def attend(query: Array, key: Array, value: Array) -> Array:
        return attend_in_blocks((query, key, value, None, None, None), _blocks(query, key))[0]

    return None, *jax.vjp(attend, *inputs)[1](cotangent)


_differentiable_output.defvjp(_output_fwd, _output_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_map(name: str, found: Array, inputs: tuple[Any, ...]) -> Array:
    """`found`, which a kernel made of `inputs`, with its derivatives by them."""
    del name, inputs
    return found


def _map_fwd(name: str, found: Array, inputs: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
    del name
    return found, inputs


def _map_bwd(name: str, inputs: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    def evaluate(query: Array, key: Array, value: Array, kernel: Any, g: Any) -> Array:
        def reduce(attended: Attended, g: Array | None = None) -> dict[str, Array]:
            given = {"weights": attended.weights, "values": value, "out_kernel": kernel}
            given["output_grad"] = g
            return {name: INDICATORS[name](*(given[need] for need in NEEDS[name]))}

        whole = (query, key, value, None, None, kernel)
        return attend_in_blocks(whole, _blocks(query, key), reduce, g)[1][name]

    return None, jax.vjp(evaluate, *inputs)[1](cotangent)


_differentiable_map.defvjp(_map_fwd, _map_bwd)


def _blocks(query: Array, key: Array) -> QueryBlocks:
    *batch, queries, heads, _ = query.shape
    chosen = suitable_blocks(math.prod(batch), heads, queries, key.shape[-3])
    return chosen or QueryBlocks(min(queries, SMALLEST_BLOCK))


def _centred(values: Array) -> tuple[Array, Array]:
    """Values less their mean over tokens, and the mean, in float32 (see `indicators._centred`)."""
    values = _float(values)
    mean = jnp.mean(values, axis=-3, keepdims=True)
    return values - mean, mean


def _float(array: Any) -> Array:
    return jnp.asarray(array).astype(jnp.float32)


def _heads_first(array: Float[Array, "*B N H K"]) -> Float[Array, "G H N K"]:
    return jnp.swapaxes(array, -3, -2).reshape(
        -1, array.shape[-2], array.shape[-3], array.shape[-1]
    )


def _tokens_first(array: Float[Array, "G H M K"], like: Array) -> Float[Array, "*B M H K"]:
    return jnp.swapaxes(array, -3, -2).reshape(like.shape)
