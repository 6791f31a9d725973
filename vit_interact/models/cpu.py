"""What XLA's CPU compiler must be told; other compilers find it themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def on_cpu() -> bool:
    """Whether programs are made for the CPU."""
    return jax.default_backend() == "cpu"


@jax.custom_jvp
def computed_once(x: Float[Array, ...]) -> Float[Array, ...]:
    """`x`, whose derivative is kept where it is made. For the residual stream, after each sum.

    The stream's derivative is a sum over all later layers. XLA's CPU compiler fuses such sums into
    everything that reads them, so that each layer would add up all later ones again (a twelve-layer
    model's training step took 1.2 times as long). It never repeats a division, so there is one: by
    a one that the compiler cannot know to be one. A barrier would not do: it is removed before.
    """
    return x


@computed_once.defjvp
def _computed_once_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    if not on_cpu():
        return x, tangent
    one = jnp.where(x == jnp.finfo(x.dtype).max, 2, 1)
    return x, tangent / one.astype(tangent.dtype)
