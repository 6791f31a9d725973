"""Activation functions, by the names that `ViTConfig.activation` takes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Abramowitz & Stegun 7.1.28: erfc(y) = (1 + a1 y + … + a6 y^6)^-16 for y >= 0, to 3e-7.
_ERFC = (0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)


def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """Exact GELU.

    jax's own takes erfc, which costs a CPU twice as much as erf. On a GPU erf is what the function
    waits for, so that 16-bit numbers get a shorter one, exact to their last digit
    (docs/benchmarks.md).
    """
    if jax.default_backend() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16):
        return narrow_gelu(x)
    return x * (0.5 + 0.5 * lax.erf(x * 0.5**0.5))


@jax.custom_jvp
def narrow_gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """GELU to 3e-7, computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide)).astype(x.dtype)


@narrow_gelu.defjvp
def _narrow_gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    density = (2 * jnp.pi) ** -0.5 * jnp.exp(-0.5 * wide * wide)
    return narrow_gelu(x), tangent * (_normal(wide) + wide * density).astype(tangent.dtype)


def _normal(x: Array) -> Array:
    """The share of a normal distribution below `x`."""
    y = jnp.abs(x) * 0.5**0.5
    total = jnp.zeros_like(y)
    for coefficient in reversed(_ERFC):
        total = (total + coefficient) * y
    # A root has one instruction; a division takes a GPU ten.
    tail = lax.rsqrt(1 + total)
    for _ in range(5):
        tail = tail * tail
    return jnp.where(x > 0, 1 - 0.5 * tail, 0.5 * tail)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),
}
