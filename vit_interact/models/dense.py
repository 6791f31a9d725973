"""Dense layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from vit_interact.models import gpu, narrow
from vit_interact.models.cpu import on_cpu
from vit_interact.models.elementwise import ACTIVATION_FUNCTIONS
from vit_interact.models.parameter import parameter


@functools.partial(jax.jit, static_argnums=3)
def dense(
    x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Float[Array, "..."] | None, axes: int
) -> Float[Array, "..."]:
    """The last `axes` axes of `x` times the first of `kernel`, plus `bias`.

    A product of two matrices and a bias that is a row. With tokens in several axes, the kernel's
    derivative takes XLA's CPU twice as long as with them in one, and with heads in an axis of their
    own, the bias's derivative many times as long; on a GPU, such a bias is written out for all
    tokens (docs/performance.md).
    """
    kept, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    depth = math.prod(kernel.shape[:axes])
    product = narrow.product(x.reshape(-1, depth), kernel.reshape(depth, -1))
    product = product if bias is None else product + bias.reshape(-1)
    return product.reshape(*kept, *outputs)


class Dense(nn.Module):
    """`nn.Dense` and `nn.DenseGeneral` with their parameters, by `dense`.

    Attributes:
      features: sizes of the output's new axes.
      axes: how many of the input's last axes they replace.
      use_bias: whether there is a bias.
      dtype: compute type.
      scale: that the output is multiplied by.
      activation: name of a GELU of the output; only without a scale.
    """

    features: int | tuple[int, ...]
    axes: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    scale: float = 1.0
    activation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the layer."""
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = (*x.shape[x.ndim - self.axes :], *features)

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            flat = math.prod(shape[: self.axes]), math.prod(features)
            return nn.initializers.lecun_normal()(key, flat).reshape(shape)

        kernel = parameter(self, "kernel", init, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, features) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.activation is not None:
            assert self.scale == 1.0
            return _activated(self.activation, x, kernel, bias, self.axes)
        if self.scale == 1.0:
            return dense(x, kernel, bias, self.axes)
        if on_cpu():
            # Its compiler multiplies where it adds the bias.
            return dense(x, kernel, bias, self.axes) * self.scale
        # A GPU would go through all tokens once more, forward and backward.
        bias = None if bias is None else bias * self.scale
        return dense(x, kernel * self.scale, bias, self.axes)


def _activated(name: str, x: Array, kernel: Array, bias: Array | None, axes: int) -> Array:
    """`dense` and a GELU, to which a GPU's kernel adds the bias."""
    width = math.prod(kernel.shape[axes:])
    found = jax.ShapeDtypeStruct((*x.shape[: x.ndim - axes], width), x.dtype)
    if name == "gelu" and bias is not None and gpu.kernels_pay(found, x.dtype):
        from vit_interact.models import pallas_elementwise

        return pallas_elementwise.gelu_of_sum(dense(x, kernel, None, axes), bias)
    return ACTIVATION_FUNCTIONS[name](dense(x, kernel, bias, axes))


class PatchEmbedding(nn.Module):
    """A convolution of patches that do not overlap, with the parameters of `nn.Conv`.

    As one product of matrices: XLA's convolution takes several times as long on a GPU, and so does
    its derivative by the images on a CPU (docs/performance.md).

    Attributes:
      features: width of a token.
      patch_size: height and width of a patch.
      use_bias: whether there is a bias.
      dtype: compute type.
    """

    features: int
    patch_size: tuple[int, int]
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B h w C"]) -> Float[Array, "B rows cols D"]:
        """Tokens of the whole patches; what is left at the right and the bottom is cut off."""
        high, wide = self.patch_size
        batch, height, width, channels = images.shape
        shape = (high, wide, channels, self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
        zeros = nn.initializers.zeros
        bias = parameter(self, "bias", zeros, (self.features,)) if self.use_bias else None
        images, kernel, bias = promote_dtype(images, kernel, bias, dtype=self.dtype)
        rows, cols = height // high, width // wide
        patches = images[:, : rows * high, : cols * wide]
        patches = patches.reshape(batch, rows, high, cols, wide, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, rows, cols, -1)
        return dense(patches, kernel.reshape(-1, self.features), bias, 1)
