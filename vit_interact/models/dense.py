"""The product of dense layers."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax
from jaxtyping import Array


def flat_dot_general(
    lhs: Array, rhs: Array, dimension_numbers: Any, *arguments: Any, **settings: Any
) -> Array:
    """`lax.dot_general` of tokens and a kernel as a product of two matrices, on a CPU.

    With tokens in several axes, the kernel's derivative takes XLA's CPU 2.5 times as long as with
    them in one (docs/benchmarks.md); forward there is no difference. Other compilers make two
    matrices of it themselves. For `dot_general` of `nn.Dense` and `nn.DenseGeneral`.
    """
    (left, right), batch = dimension_numbers
    kept = lhs.ndim - len(left)
    flat = tuple(left) == tuple(range(kept, lhs.ndim)) and tuple(right) == tuple(range(len(right)))
    if any(batch) or not flat or jax.default_backend() != "cpu":
        return lax.dot_general(lhs, rhs, dimension_numbers, *arguments, **settings)
    outputs = rhs.shape[len(right) :]
    depth = math.prod(rhs.shape[: len(right)])
    product = lax.dot_general(
        lhs.reshape(-1, depth), rhs.reshape(depth, -1), (((1,), (0,)), ((), ())),
        *arguments, **settings,
    )  # fmt: skip
    return product.reshape(*lhs.shape[:kept], *outputs)
