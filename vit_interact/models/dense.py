"""Dense layers."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from vit_interact.models.cpu import on_cpu


def dense(
    x: Float[Array, ...], kernel: Float[Array, ...], bias: Float[Array, ...] | None, axes: int
) -> Float[Array, ...]:
    """The last `axes` axes of `x` times the first of `kernel`, plus `bias`.

    On a CPU this is a product of two matrices and a bias that is a row. With tokens in several
    axes, the kernel's derivative takes XLA's CPU twice as long as with them in one, and with heads
    in an axis of their own, the bias's derivative many times as long (docs/benchmarks.md). Other
    compilers make two matrices of it themselves.
    """
    kept, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    if not on_cpu():
        last, first = tuple(range(len(kept), x.ndim)), tuple(range(axes))
        product = lax.dot_general(x, kernel, ((last, first), ((), ())))
        return product if bias is None else product + bias
    depth = math.prod(kernel.shape[:axes])
    product = x.reshape(-1, depth) @ kernel.reshape(depth, -1)
    product = product if bias is None else product + bias.reshape(-1)
    return product.reshape(*kept, *outputs)


class Dense(nn.Module):
    """`nn.Dense` and `nn.DenseGeneral` with their parameters, by `dense`.

    Attributes:
      features: sizes of the output's new axes.
      axes: how many of the input's last axes they replace.
      use_bias: whether there is a bias.
      dtype: compute type.
    """

    features: int | tuple[int, ...]
    axes: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """Applies the layer."""
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = (*x.shape[x.ndim - self.axes :], *features)

        def init(key: Array, flat: tuple[int, int]) -> Array:
            return nn.initializers.lecun_normal()(key, flat).reshape(shape)

        kernel = self.param("kernel", init, (math.prod(shape[: self.axes]), math.prod(features)))
        bias = self.param("bias", nn.initializers.zeros, features) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return dense(x, kernel, bias, self.axes)
