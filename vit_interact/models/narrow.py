"""Products of 16-bit arrays, for CPUs with matrix units (AMX).

XLA's CPU compiler makes a bfloat16 product of bfloat16 arrays by float32 arithmetic. YNNPACK, which
it asks for products, knows those units, but only products that are left in float32. So here they
are, and are rounded afterwards, which is what the compiler does as well (docs/performance.md).
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_interact.models.cpu import on_cpu


def product(x: Float[Array, "M D"], kernel: Float[Array, "D E"]) -> Float[Array, "M E"]:
    """`x @ kernel`; by matrix units, its derivative is of reverse mode alone."""
    if units_take(x.dtype) and x.dtype == kernel.dtype:
        return _product(x, kernel)
    return x @ kernel


def contract(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum(spec, a, b)`, which is not derived again."""
    if units_take(a.dtype) and a.dtype == b.dtype:
        return _rounded(spec, a, b)
    return jnp.einsum(spec, a, b)


def units_take(dtype: jnp.dtype) -> bool:
    """Whether programs are made for a CPU that multiplies such numbers as matrices."""
    return dtype == jnp.bfloat16 and on_cpu() and _has_units()


@functools.cache
def _has_units() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _rounded(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return _rounded("md,de->me", x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return _rounded("me,de->md", grad, kernel), _rounded("md,me->de", x, grad)


_product.defvjp(_forward, _backward)
