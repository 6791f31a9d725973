"""GELU and layer normalisation, whose derivatives keep one array each on a CPU.

Left to themselves, both keep what they made on the way for the backward pass: `erf` of the hidden
tokens, and tokens without their mean. XLA's CPU compiler then writes these in passes of their own.
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

from vit_interact.models.cpu import on_cpu


def _erf_gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    # jax's own exact GELU takes erfc, which costs a CPU twice as much (docs/benchmarks.md).
    return x * (0.5 + 0.5 * lax.erf(x * 0.5**0.5))


@jax.custom_jvp
def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """Exact GELU, `x` times the normal distribution's function (Hendrycks and Gimpel 2016)."""
    return _erf_gelu(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    if not on_cpu():
        return jax.jvp(_erf_gelu, primals, tangents)
    (x,), (tangent,) = primals, tangents
    # `erf` of the negated argument: were it the same as above, XLA would make it once and keep it.
    below = 0.5 - 0.5 * lax.erf(x * -(0.5**0.5))
    density = jnp.exp(-0.5 * jnp.square(x)) * (0.5 / jnp.pi) ** 0.5
    return gelu(x), tangent * (below + x * density)


ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),
}
"""By their names in `ViTConfig.activation`."""


def _standardised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """`x` with mean 0 and variance 1 along the last axis, and what it was multiplied by.

    The variance is the mean square of what is left without the mean: E[x²]−E[x]² would lose digits
    where the mean is large, as in DINOv2.
    """
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    share = lax.rsqrt(variance + epsilon)
    return centred * share, share


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardise(x: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B D"]:
    """`x` with mean 0 and variance 1 along the last axis (Ba et al. 2016, without gain and bias).

    Args:
      x: tokens.
      epsilon: added to the variance.
    """
    return _standardised(x, epsilon)[0]


@standardise.defjvp
def _standardise_jvp(
    epsilon: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    if not on_cpu():
        return jax.jvp(lambda x: _standardised(x, epsilon)[0], primals, tangents)
    (x,), (tangent,) = primals, tangents
    found, share = _standardised(x, epsilon)
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
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises each token."""
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        # XLA's CPU takes four times as long for the derivative of one image's `[1, N, D]`.
        alone = x.reshape(x.shape[1:]) if x.ndim > 2 and len(x) == 1 else x
        wide = alone.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = standardise(wide, self.epsilon) * scale + bias
        return normal.astype(self.dtype).reshape(x.shape)
