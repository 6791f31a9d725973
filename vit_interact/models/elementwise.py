"""GELU and layer normalisation, whose derivatives keep one array each.

Left to themselves, both keep what they made on the way for the backward pass: `erf` of the hidden
tokens, and tokens without their mean. XLA then writes these in passes of their own.

Each is a program of its own, so that the layers of a model share one trace of it, and of its
derivatives (docs/benchmarks.md, `tracing`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vit_interact.models import gpu
from vit_interact.models.half_erf import half_erf
from vit_interact.models.parameter import parameter

Elementwise = Callable[[Array], Array]


def _with_slope(value: Elementwise, slope: Elementwise) -> Elementwise:
    """`value`, whose derivative is `slope` and keeps its argument alone.

    `slope` is not to repeat an expensive term of `value`: XLA would make it once and keep it. So it
    has `erf`, `tanh` and the sigmoid of the negated argument.
    """

    @jax.custom_jvp
    def function(x: Array) -> Array:
        return value(x)

    @function.defjvp
    def along(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (x,), (tangent,) = primals, tangents
        return function(x), tangent * slope(x)

    return jax.jit(function)


def _erf_value(x: Array) -> Array:
    return (x * (0.5 + half_erf(x))).astype(x.dtype)


def _erf_slope(x: Array) -> Array:
    density = jnp.exp(-0.5 * jnp.square(x)) * (0.5 / jnp.pi) ** 0.5
    return (0.5 - half_erf(-x) + x * density).astype(x.dtype)


def _tanh_slope(x: Array) -> Array:
    factor, cubic = (2 / jnp.pi) ** 0.5, 0.044715
    below = -jnp.tanh(x * -factor * (1 + cubic * jnp.square(x)))
    rise = factor * (1 + 3 * cubic * jnp.square(x))
    return 0.5 * (1 + below) + 0.5 * x * (1 - below) * (1 + below) * rise


def _sigmoid_slope(x: Array, factor: float) -> Array:
    above = nn.sigmoid(-factor * x)
    return (1 - above) * (1 + factor * x * above)


ACTIVATION_FUNCTIONS: dict[str, Elementwise] = {
    # jax's own exact GELU takes erfc, which costs a CPU twice as much (docs/performance.md).
    "gelu": _with_slope(_erf_value, _erf_slope),
    "gelu_tanh": _with_slope(lambda x: nn.gelu(x, approximate=True), _tanh_slope),
    "gelu_quick": _with_slope(
        lambda x: x * nn.sigmoid(1.702 * x), lambda x: _sigmoid_slope(x, 1.702)
    ),
    "silu": _with_slope(nn.silu, lambda x: _sigmoid_slope(x, 1.0)),
}
"""GELUs by their names in `ViTConfig.activation`, and what SwiGLU has."""


def _statistics(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Mean along the last axis, and one over the standard deviation.

    The variance is the mean square of what is left without the mean: E[x²]−E[x]² would lose digits
    where the mean is large, as in DINOv2.
    """
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return mean, lax.rsqrt(variance + epsilon)


@functools.partial(jax.jit, static_argnums=1)
def standardise(x: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B D"]:
    """`x` with mean 0 and variance 1 along the last axis (Ba et al. 2016, without gain and bias).

    Args:
      x: tokens.
      epsilon: added to the variance.
    """
    return _standardise(x, epsilon)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardise(x: Array, epsilon: float) -> Array:
    mean, share = _statistics(x, epsilon)
    return (x - mean) * share


@_standardise.defjvp
def _standardise_jvp(
    epsilon: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    # Behind a barrier, or XLA's GPU compiler makes the statistics again in each kernel that needs
    # normal tokens, and writes these out in float32 (docs/performance.md).
    middle, share = lax.optimization_barrier(_statistics(x, epsilon))
    found = (x - middle) * share
    mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
    return found, share * (tangent - mean(tangent) - found * mean(tangent * found))


class LayerNorm(nn.Module):
    """`nn.LayerNorm` with its parameters, by `standardise`; in float32 or wider.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], keep: bool = False) -> Any:
        """Normalises each token, `[..., D]`.

        Args:
          x: tokens.
          keep: gives the tokens, too, for whoever adds to them: backward, a GPU adds the derivative
            by these to that of LayerNorm in one pass.
        """
        width = x.shape[-1:]
        scale = parameter(self, "scale", nn.initializers.ones, width, jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, width, jnp.float32)
        if keep and gpu.kernels_pay(x, self.dtype):
            from vit_interact.models import pallas_elementwise

            return pallas_elementwise.norm_and_tokens(x, scale, bias, self.epsilon)
        # XLA's CPU takes four times as long for the derivative of one image's `[1, N, D]`.
        alone = x.reshape(x.shape[1:]) if x.ndim > 2 and len(x) == 1 else x
        wide = alone.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = standardise(wide, self.epsilon) * scale + bias
        normal = normal.astype(self.dtype).reshape(x.shape)
        return (normal, x) if keep else normal
