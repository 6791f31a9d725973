"""Whether a GPU takes our kernels, without importing Pallas, which a command would wait for."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from vit_interact.models import fused

PIECE = 512
"""The most of a token that a kernel of LayerNorm or GELU takes as one array."""
_MOST_PIECES = 8
_FEWEST = 1024  # tokens; with fewer, a kernel's start is all that there is


@functools.cache
def has_triton() -> bool:
    """Whether this jax has Pallas' way through Triton, which a later one gives up."""
    try:
        import jax.experimental.pallas.triton  # noqa: F401
    except ImportError:
        return False
    return True


def piece_of(width: int) -> int:
    """The largest power of two that divides a token's width, up to `PIECE`."""
    return min(PIECE, width & -width)


def kernels_pay(x: Any, dtype: Any) -> bool:
    """Whether those of `pallas_elementwise` take tokens: 16 bit, many, on one NVIDIA GPU.

    XLA does not split them over devices. Their derivative is of reverse mode, once.

    Args:
      x: tokens `[..., D]`, or their shape.
      dtype: of the result.
    """
    width = x.shape[-1]
    return (
        x.dtype == dtype and fused.cudnn_knows(jnp.dtype(dtype), 64) and jax.device_count() == 1
        and math.prod(x.shape[:-1]) >= _FEWEST and width <= _MOST_PIECES * piece_of(width)
        and has_triton()
    )  # fmt: skip
