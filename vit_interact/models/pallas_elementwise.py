"""LayerNorm and GELU on NVIDIA's GPUs, by Pallas kernels through Triton.

XLA reads tokens three times for their statistics and their normal form, and more often backward;
and its loops keep too few bytes on their way. The two took a quarter of a training step
(docs/performance.md). Here each is one kernel forward and one backward, which makes again what it
needs of the forward pass. A program works on some tokens, whose width it takes in pieces of a power
of two; what scale and bias sum over all tokens is added up by about a thousand programs, and then
over these.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from vit_interact.models.gpu import piece_of
from vit_interact.models.half_erf import FAR, ODD, polynomial
from vit_interact.models.pallas_gpu import Sizes, call, exp2, stretch
from vit_interact.models.tile_maps import LOG2_E

_AT_ONCE = 4096  # numbers of a program's tokens
_PROGRAMS = 1056  # of a backward pass


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm_and_tokens(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """LayerNorm of tokens in their type, and the tokens as they are.

    Whoever adds to the tokens is to take them from here: backward, the kernel then adds the
    derivative by them to that of LayerNorm, which would be a pass of its own.

    Args:
      x: tokens, of any floating type; statistics are of float32.
      scale: float32.
      bias: float32.
      epsilon: added to the variance.
      interpret: for tests on a CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    return _forward(flat, scale, bias, epsilon, interpret).reshape(x.shape), x


def _norm_fwd(
    x: Array, scale: Array, bias: Array, epsilon: float, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return norm_and_tokens(x, scale, bias, epsilon, interpret), (x, scale)


def _norm_bwd(
    epsilon: float, interpret: bool, kept: tuple[Array, Array], grads: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale = kept
    flat = [array.reshape(-1, x.shape[-1]) for array in (x, *grads)]
    by_x, by_scale, by_bias = _backward(*flat, scale, epsilon, interpret)
    return by_x.reshape(x.shape), by_scale, by_bias


norm_and_tokens.defvjp(_norm_fwd, _norm_bwd)


# Programs of their own, which the layers of a model share.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _forward(x: Array, scale: Array, bias: Array, epsilon: float, interpret: bool) -> Array:
    size = _tokens(*x.shape)
    return call(
        functools.partial(_forward_kernel, epsilon, size),
        Sizes(size, x.shape[1]),
        "norm",
        interpret,
        grid=(pl.cdiv(len(x), size),),
        in_specs=[_whole(one) for one in (x, scale, bias)],
        out_specs=_whole(x),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x, scale, bias)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _backward(
    x: Array, by_norm: Array, by_tokens: Array, scale: Array, epsilon: float, interpret: bool
) -> tuple[Array, Array, Array]:
    count, width = x.shape
    size = _tokens(count, width)
    programs = min(_PROGRAMS, pl.cdiv(count, size))
    sums = jax.ShapeDtypeStruct((programs, width), jnp.float32)
    by_x, *sums = call(
        functools.partial(_backward_kernel, epsilon, size, programs),
        Sizes(size, width),
        "norm_backward",
        interpret,
        grid=(programs,),
        in_specs=[_whole(one) for one in (x, by_norm, by_tokens, scale)],
        out_specs=[_whole(one) for one in (x, sums, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums],
    )(x, by_norm, by_tokens, scale)
    by_scale, by_bias = (jnp.sum(one, axis=0) for one in sums)
    return by_x, by_scale, by_bias


def _pieces(width: int) -> list[Any]:
    """Slices of a token; Triton's arrays are of powers of two."""
    piece = piece_of(width)
    return [pl.ds(start, piece) for start in range(0, width, piece)]


def _tokens(count: int, width: int) -> int:
    """Tokens of a program at a time."""
    return 1 << (max(1, min(count, _AT_ONCE // width)).bit_length() - 1)


def _new(own: Any, start: Any) -> Float[Array, "M 1"]:
    """1 for a program's own tokens, 0 for those that another has, too: the last start earlier."""
    number = lax.broadcasted_iota(jnp.int32, (own.size, 1), 0) + own.start
    return (number >= start).astype(jnp.float32)


def _whole(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))


def _load(ref: Any, own: Any, pieces: Sequence[Any]) -> list[Array]:
    return [ref[own, piece].astype(jnp.float32) for piece in pieces]


def _normal(x: Sequence[Array], epsilon: float) -> tuple[list[Array], Array]:
    """Tokens with mean 0 and variance 1, in pieces, and one over the standard deviation."""
    mean = _over_tokens(x)
    centred = [one - mean for one in x]
    share = lax.rsqrt(_over_tokens([one * one for one in centred]) + epsilon)
    return [one * share for one in centred], share


def _over_tokens(pieces: Sequence[Array]) -> Array:
    """Mean over the width, `[tokens, 1]`."""
    width = sum(one.shape[1] for one in pieces)
    sums = [jnp.sum(one, axis=1, keepdims=True) for one in pieces]
    return functools.reduce(jnp.add, sums) * (1 / width)


def _forward_kernel(
    epsilon: float, size: int, x_ref: Any, scale_ref: Any, bias_ref: Any, out_ref: Any
) -> None:
    own = stretch(pl.program_id(0), size, x_ref.shape[0])
    pieces = _pieces(x_ref.shape[1])
    normal, _ = _normal(_load(x_ref, own, pieces), epsilon)
    for piece, one in zip(pieces, normal, strict=True):
        found = one * scale_ref[piece][None, :] + bias_ref[piece][None, :]
        out_ref[own, piece] = found.astype(out_ref.dtype)


def _backward_kernel(
    epsilon: float, size: int, programs: int, x_ref: Any, norm_ref: Any, tokens_ref: Any,
    scale_ref: Any, out_ref: Any, by_scale_ref: Any, by_bias_ref: Any,
) -> None:  # fmt: skip
    count, width = x_ref.shape
    pieces = _pieces(width)
    program = pl.program_id(0)
    zeros = [jnp.zeros((size, piece.size), jnp.float32) for piece in pieces]

    def step(turn: Any, carry: Any) -> Any:
        tile = program + turn * programs
        own = stretch(tile, size, count)
        # Before anything is made of them, or each would be waited for by itself.
        x, by_norm, by_tokens = (_load(ref, own, pieces) for ref in (x_ref, norm_ref, tokens_ref))
        normal, share = _normal(x, epsilon)
        new = _new(own, tile * size)
        slopes = [one * scale_ref[p][None, :] for one, p in zip(by_norm, pieces, strict=True)]
        mean = _over_tokens(slopes)
        along = _over_tokens([a * b for a, b in zip(slopes, normal, strict=True)])
        for piece, slope, one, kept in zip(pieces, slopes, normal, by_tokens, strict=True):
            found = (slope - mean - one * along) * share + kept
            out_ref[own, piece] = found.astype(out_ref.dtype)
        by_scale, by_bias = carry
        by_scale = [s + new * a * b for s, a, b in zip(by_scale, by_norm, normal, strict=True)]
        by_bias = [s + new * a for s, a in zip(by_bias, by_norm, strict=True)]
        return by_scale, by_bias

    turns = math.ceil(math.ceil(count / size) / programs)
    found = lax.fori_loop(0, turns, step, (zeros, zeros))
    for ref, sums in zip((by_scale_ref, by_bias_ref), found, strict=True):
        for piece, one in zip(pieces, sums, strict=True):
            ref[program, piece] = jnp.sum(one, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gelu_of_sum(
    x: Float[Array, "*B D"], bias: Float[Array, " D"], interpret: bool = False
) -> Float[Array, "*B D"]:
    """GELU of `x + bias`, in the type of `x`.

    Backward, the bias's derivative is summed while that of `x` is made.

    Args:
      x: products of tokens, of any floating type.
      bias: of any floating type.
      interpret: for tests on a CPU.
    """
    return _gelu(x.reshape(-1, x.shape[-1]), bias, interpret).reshape(x.shape)


def _gelu_fwd(x: Array, bias: Array, interpret: bool) -> tuple[Array, tuple[Array, Array]]:
    return gelu_of_sum(x, bias, interpret), (x, bias)


def _gelu_bwd(interpret: bool, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, bias = kept
    flat = (array.reshape(-1, x.shape[-1]) for array in (x, grad))
    by_x, by_bias = _gelu_backward(*flat, bias, interpret)
    return by_x.reshape(x.shape), by_bias.astype(bias.dtype)


gelu_of_sum.defvjp(_gelu_fwd, _gelu_bwd)


@functools.partial(jax.jit, static_argnums=2)
def _gelu(x: Array, bias: Array, interpret: bool) -> Array:
    count, width = x.shape
    piece = piece_of(width)
    size = _tokens(count, piece)
    return call(
        functools.partial(_gelu_kernel, size, piece, interpret),
        Sizes(size, piece),
        "gelu",
        interpret,
        grid=(width // piece, pl.cdiv(count, size)),
        in_specs=[_whole(x), _whole(bias)],
        out_specs=_whole(x),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x, bias)


@functools.partial(jax.jit, static_argnums=3)
def _gelu_backward(x: Array, grad: Array, bias: Array, interpret: bool) -> tuple[Array, Array]:
    count, width = x.shape
    piece = piece_of(width)
    size = _tokens(count, piece)
    programs = min(pl.cdiv(_PROGRAMS, width // piece), pl.cdiv(count, size))
    sums = jax.ShapeDtypeStruct((programs, width), jnp.float32)
    by_x, by_bias = call(
        functools.partial(_gelu_backward_kernel, size, piece, programs, interpret),
        Sizes(size, piece),
        "gelu_backward",
        interpret,
        grid=(width // piece, programs),
        in_specs=[_whole(one) for one in (x, grad, bias)],
        out_specs=[_whole(x), _whole(sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums],
    )(x, grad, bias)
    return by_x, jnp.sum(by_bias, axis=0)


def _half_erf(x: Array, interpret: bool) -> Array:
    """`half_erf.polynomial`, whose products and sums XLA's Triton would not join."""
    if interpret:
        return polynomial(x)
    from jax.experimental.pallas import triton

    def number(value: float) -> str:
        return f"0f{struct.pack('>f', value).hex().upper()}"

    *lower, highest = ODD
    steps = [f"fma.rn.f32 p, p, z, {number(factor)};" for factor in reversed(lower)]
    asm = f"""{{
        .reg .f32 n, z, p;
        max.f32 n, $1, {number(-FAR)}; min.f32 n, n, {number(FAR)};
        mul.f32 z, n, n; mov.f32 p, {number(highest)};
        {" ".join(steps)}
        mul.f32 $0, p, n;
    }}"""
    (found,) = triton.elementwise_inline_asm(
        asm, args=[x], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )  # fmt: skip
    return found


def _gelu_kernel(
    size: int, piece: int, interpret: bool, x_ref: Any, bias_ref: Any, out_ref: Any
) -> None:
    here = pl.ds(pl.program_id(0) * piece, piece)
    own = stretch(pl.program_id(1), size, x_ref.shape[0])
    x = x_ref[own, here].astype(jnp.float32) + bias_ref[here].astype(jnp.float32)[None, :]
    out_ref[own, here] = (x * (0.5 + _half_erf(x, interpret))).astype(out_ref.dtype)


def _gelu_backward_kernel(
    size: int, piece: int, programs: int, interpret: bool, x_ref: Any, grad_ref: Any,
    bias_ref: Any, out_ref: Any, sums_ref: Any,
) -> None:  # fmt: skip
    here, program = pl.ds(pl.program_id(0) * piece, piece), pl.program_id(1)
    count = x_ref.shape[0]
    bias = bias_ref[here].astype(jnp.float32)[None, :]

    def step(turn: Any, total: Array) -> Array:
        tile = program + turn * programs
        own = stretch(tile, size, count)
        x, grad = (ref[own, here].astype(jnp.float32) for ref in (x_ref, grad_ref))
        x = x + bias
        density = exp2(interpret, x * x * (-0.5 * LOG2_E)) * (0.5 / math.pi) ** 0.5
        found = grad * (0.5 + _half_erf(x, interpret) + x * density)
        out_ref[own, here] = found.astype(out_ref.dtype)
        return total + _new(own, tile * size) * found

    turns = math.ceil(math.ceil(count / size) / programs)
    total = lax.fori_loop(0, turns, step, jnp.zeros((size, piece), jnp.float32))
    sums_ref[program, here] = jnp.sum(total, axis=0)
