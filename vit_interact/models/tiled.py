"""Attention and indicators whose weights exist for a tile at a time, by Pallas kernels.

`attend_in_tiles` does what `attend.attend_in_blocks` does, on GPUs with the kernels of
`models/pallas_gpu.py`, on TPUs with those of `models/pallas_tpu.py`, on a CPU with Pallas'
interpreter, which is for tests. Derivatives do not: that of the output is cuDNN's where that can be
had, and else XLA's in blocks of queries, as those of maps are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vit_interact.interactions.indicators import INDICATORS, NEEDS
from vit_interact.models import pallas_gpu as gpu
from vit_interact.models import pallas_tpu as tpu
from vit_interact.models.attend import (
    SMALLEST_BLOCK,
    Attended,
    QueryBlocks,
    Tiles,
    attend_in_blocks,
    suitable_blocks,
)
from vit_interact.models.fused import cudnn_attention, cudnn_takes
from vit_interact.models.tile_maps import CUTS, LOG, MAPS, REST, WHICH, MapSides

_EXACT = lax.Precision.HIGHEST


class Tiled:
    """What reductions get in place of `Attended`: no weights, but a way to each indicator.

    What several of them need is made once, and what none needs is not made.

    Attributes:
      query: `[..., M, H, K]`, scaled by `1/sqrt(K)`.
      key: `[..., N, H, K]`.
      values: `[..., N, H, K]`.
      out_kernel: `[H, K, D]`, multiplied by LayerScale where the model has it; None when unknown.
      tiles: their sizes.
    """

    def __init__(
        self, query: Array, key: Array, values: Array, out_kernel: Array | None, tiles: Tiles
    ) -> None:
        self.query, self.key, self.values = query, key, values
        self.out_kernel, self.tiles = out_kernel, tiles

    def indicator(self, name: str, g: Array | None = None) -> Float[Array, "*B M N"]:
        """The map of an indicator, `g` being the gradient of the output `[..., M, H, K]`.

        Raises:
          ValueError: for an indicator that has no kernel.
        """
        return stack_maps([self.later(name, g)])[0]

    def later(self, name: str, g: Array | None = None) -> LaterMap:
        """What `indicator` makes the map from.

        Raises:
          ValueError: for an indicator that has no kernel.
        """
        if name not in MAPS:
            known = ", ".join((*MAPS, "rollout"))
            raise ValueError(f"no Pallas kernel for {name!r}; there is one for {known}")
        inputs = (self.query, self.key, self.values, self.out_kernel, g)
        return LaterMap(name, self.tiles, inputs, lax.stop_gradient(self._sides(name, g)))

    @property
    def output(self) -> Float[Array, "*B M H K"]:
        """Each head's output, in the values' type."""
        if "_cut" not in self.__dict__:
            return self._attended[0].reshape(self.query.shape)
        output = self._cut.output + (0 if self._narrow else self._mean)
        return output.astype(self.values.dtype).reshape(self.query.shape)

    @functools.cached_property
    def _inputs(self) -> tuple[Array, Array, Array]:
        """Query, key and value with leading axes as one."""
        whole = lax.stop_gradient((self.query, self.key, self.values))
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in whole)
        return query, key, value

    @functools.cached_property
    def _narrow(self) -> bool:
        """Whether products may be rounded as their inputs were."""
        return self.values.dtype != jnp.float32

    @functools.cached_property
    def _mean(self) -> Array:
        """Of the values over tokens, float32 (see `indicators._centred`)."""
        return jnp.mean(_float(self._inputs[2]), axis=1, keepdims=True)

    @functools.cached_property
    def _attended(self) -> tuple[Array, Array]:
        """Outputs, and the first column of the rows' statistics."""
        attend = lambda module: _attend_by_cut_rows if module is tpu else module.attend  # noqa: E731
        return _by_platform(attend, self.tiles, *self._inputs)

    @functools.cached_property
    def _cut(self) -> _Cut:
        query, key, value = self._inputs
        value = value if self._narrow else value - self._mean
        rest, rows = _by_platform(lambda module: module.cut_rows, self.tiles, query, key, value)
        return _Cut.of(value, rest, rows)

    def _sides(self, name: str, g: Array | None) -> MapSides:
        query, key, value = self._inputs
        if "out_kernel" in NEEDS[name] and self.out_kernel is None:
            raise ValueError(
                f"{name} needs out_kernel, which this model's attention does not expose"
            )
        if "output_grad" in NEEDS[name]:
            if g is None:
                raise ValueError(f"{name} needs the gradient of the output")
            g = lax.stop_gradient(g).reshape(query.shape).astype(value.dtype)
        cut = name in CUTS or "_cut" in self.__dict__
        sides = MapSides(query, key, self._cut.rows if cut else self._attended[1])
        if name == "gradient":
            sides = sides._replace(left=g, value=value)
        elif name == "edge":
            value = value if self._narrow else value - self._mean
            ends = _sum(_float(g) * self._cut.output), _sum(_float(g) * self._cut.change)
            sides = sides._replace(left=g, value=value, ends=_columns(*ends))
        elif name == "leave_one_out":
            kernel = _float(lax.stop_gradient(self.out_kernel))
            metric = jnp.einsum("hkd,hld->hkl", kernel, kernel, precision=_EXACT)
            centred = _float(value) - self._mean
            # Products with values as they are, where these are narrow; else with centred ones.
            mean = self._mean if self._narrow else jnp.zeros_like(self._mean)
            output = self._cut.output - mean
            left, centred_m, change_m = (
                jnp.einsum("bihk,hkl->bihl", x, metric, precision=_EXACT)
                for x in (output, centred, self._cut.change)
            )
            ends = (
                _sum(left * (output + 2 * mean)),
                jax.nn.relu(_sum(change_m * self._cut.change)),
            )
            own = jnp.swapaxes(_sum(centred_m * centred), 1, 2)[..., None, :]
            value = value if self._narrow else centred
            sides = sides._replace(left=left, value=value, ends=_columns(*ends), own=own)
        return sides


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "sides"),
    meta_fields=("name", "tiles"),
)
@dataclasses.dataclass(frozen=True)
class LaterMap:
    """A map that is not made yet, so that several can be written where they belong.

    Attributes:
      name: of the indicator.
      tiles: asked for.
      inputs: query, key, values, output kernel and gradient, for derivatives.
      sides: what the kernel takes.
    """

    name: str
    tiles: Tiles
    inputs: tuple[Any, ...]
    sides: MapSides


def stack_maps(layers: Sequence[LaterMap]) -> Float[Array, "L *B M N"]:
    """The maps of several layers of one model."""
    name, tiles, batch = layers[0].name, layers[0].tiles, layers[0].inputs[0].shape[:-3]
    inputs, sides = (tuple(getattr(one, part) for one in layers) for part in ("inputs", "sides"))
    kernel = lambda module: functools.partial(module.stacked_maps, name)  # noqa: E731
    found = _by_platform(kernel, tiles, sides)
    found = found.reshape(len(layers), *batch, *found.shape[-2:])
    return _differentiable_maps(name, lax.stop_gradient(found), inputs)


class _Cut(NamedTuple):
    """Rows with their largest key apart (`head_terms.cut_dominant`), float32.

    Attributes:
      rows: all columns of their statistics `[B, H, M, 3]`.
      output: `[B, M, H, K]`.
      change: of the output where the largest key is cut, `[B, M, H, K]`.
    """

    rows: Array
    output: Array
    change: Array

    @classmethod
    def of(cls, value: Array, rest: Array, rows: Array) -> _Cut:
        which, rest_sum = (jnp.swapaxes(rows[..., c], 1, 2)[..., None] for c in (WHICH, REST))
        largest = jnp.take_along_axis(
            value, which.astype(jnp.int32), axis=1, mode="promise_in_bounds"
        )
        total, others = 1 + rest_sum, rest_sum > 0
        alone = jnp.where(others, rest / jnp.where(others, rest_sum, 1), largest)
        return cls(rows, (rest + largest) / total, (alone - largest) / total)


def attend_in_tiles(
    inputs: tuple[Any, ...],
    tiles: Tiles,
    reduce: Callable[..., dict[str, Any]] | None = None,
    output_grad: Float[Array, "*B M H K"] | None = None,
) -> tuple[Float[Array, "*B M H K"], dict[str, Any]]:
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
    tiled = Tiled(query, key, value, out_kernel, tiles)
    given = (tiled,) if output_grad is None else (tiled, output_grad)
    found = reduce(*given) if reduce else {}
    # After the reductions, which may have made it on their way.
    return _differentiable_output(tiled.output, query, key, value), found


def _by_platform(kernel: Callable[[Any], Callable[..., Any]], tiles: Tiles, *arrays: Any) -> Any:
    """Chosen when a program is lowered, so that programs can be exported for other machines.

    Args:
      kernel: the function of a platform's module.
      tiles: asked for.
      *arrays: for the function.
    """
    tile = (tiles.queries, tiles.keys) if tiles.queries else None

    def on(module: Any, interpret: bool = False) -> Callable[..., Any]:
        return functools.partial(kernel(module), tile=tile, interpret=interpret)

    interpreted = on(gpu if tiles.interpret == "gpu" else tpu, True)
    return lax.platform_dependent(*arrays, cpu=interpreted, tpu=on(tpu), default=on(gpu))


def _attend_by_cut_rows(
    query: Array, key: Array, value: Array, tile: tuple[int, int] | None, interpret: bool
) -> tuple[Array, Array]:
    """`pallas_gpu.attend` for a TPU, which has no kernel of its own for it."""
    cut = _Cut.of(value, *tpu.cut_rows(query, key, value, tile, interpret))
    return cut.output.astype(value.dtype), cut.rows[..., LOG : LOG + 1]


@jax.custom_vjp
def _differentiable_output(output: Array, query: Array, key: Array, value: Array) -> Array:
    """`output`, which a kernel made of the others, with its derivatives by them."""
    del query, key, value
    return output


def _output_fwd(output: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return output, inputs


def _output_bwd(inputs: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    def attend(query: Array, key: Array, value: Array) -> Array:
        if cudnn_takes(query, key, value):
            return cudnn_attention(query, key, value)
        return attend_in_blocks((query, key, value, None, None, None), _blocks(query, key))[0]

    return None, *jax.vjp(attend, *inputs)[1](cotangent)


_differentiable_output.defvjp(_output_fwd, _output_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_maps(name: str, found: Array, inputs: tuple[Any, ...]) -> Array:
    """`found`, which kernels made of each layer's `inputs`, with its derivatives by them."""
    del name, inputs
    return found


def _maps_fwd(name: str, found: Array, inputs: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
    del name
    return found, inputs


def _maps_bwd(name: str, inputs: tuple[Any, ...], cotangents: Array) -> tuple[Any, ...]:
    def evaluate(query: Array, key: Array, value: Array, kernel: Any, g: Any) -> Array:
        def reduce(attended: Attended, g: Array | None = None) -> dict[str, Array]:
            given = {
                "weights": attended.weights,
                "values": attended.values,
                "out_kernel": attended.out_kernel,
            }
            given["output_grad"] = g
            return {name: INDICATORS[name](*(given[need] for need in NEEDS[name]))}

        whole = (query, key, value, None, None, kernel)
        return attend_in_blocks(whole, _blocks(query, key), reduce, g)[1][name]

    layers = zip(inputs, cotangents, strict=True)
    return None, tuple(jax.vjp(evaluate, *one)[1](cotangent) for one, cotangent in layers)


_differentiable_maps.defvjp(_maps_fwd, _maps_bwd)


def _blocks(query: Array, key: Array) -> QueryBlocks:
    *batch, queries, heads, _ = query.shape
    chosen = suitable_blocks(math.prod(batch), heads, queries, key.shape[-3])
    return chosen or QueryBlocks(min(queries, SMALLEST_BLOCK))


def _float(array: Any) -> Array:
    return jnp.asarray(array).astype(jnp.float32)


def _sum(array: Float[Array, "B N H K"]) -> Float[Array, "B N H"]:
    return jnp.sum(array, axis=-1)


def _columns(*columns: Float[Array, "B N H"]) -> Float[Array, "B H N C"]:
    return jnp.swapaxes(jnp.stack(columns, axis=-1), 1, 2)
