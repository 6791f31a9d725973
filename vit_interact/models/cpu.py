"""What XLA's CPU compiler must be told; other compilers find it themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_interact.programs import Program

if TYPE_CHECKING:
    from vit_interact.models.config import ViTConfig

_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
# Of YNNPACK, which XLA asks for products, too, this leaves sums and what they are made of.
_OWN_PRODUCTS = {_YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE"}
# And this leaves convolutions, which our models have none of.
_ALL_OWN = {_YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
# Tokens of all images from which on these are faster, and from which on a forward pass takes longer
# than what a smaller program saves at its start (docs/performance.md).
_MANY_ROWS, _LONG = 512, 768


def on_cpu() -> bool:
    """Whether programs are made for the CPU."""
    return jax.default_backend() == "cpu"


def can_split_images() -> bool:
    """Whether to work on some images of a batch at a time: not where they are on many devices."""
    return on_cpu() and jax.device_count() == 1


@jax.custom_jvp
def computed_once(x: Float[Array, "..."]) -> Float[Array, "..."]:
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


def compiler_options(model: Any, images: int, seldom: bool = False) -> dict[str, str]:
    """`compiler_options` of `jax.jit` for a program that is mostly forward passes; {} for none.

    XLA's CPU compiler leaves products to YNNPACK, whose time per row stays the same; that of its
    own products falls with their number. `vi.measure` and our commands ask for them by themselves;
    within a program of somebody else's, `jax.jit` there is to be told.

    Args:
      model: our `ViT`, of float32; {} for others.
      images: in a batch.
      seldom: the program runs a few times only, so that its first run counts: there YNNPACK plans
        each of its operations, as long as three images take at 224 pixels.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "layout") or jnp.dtype(config.dtype) != jnp.float32 or not on_cpu():
        return {}
    if not _known_here():
        return {}
    if seldom and few(config, images):
        return dict(_ALL_OWN)
    return dict(_OWN_PRODUCTS) if images * config.layout.num_tokens >= _MANY_ROWS else {}


def few(config: ViTConfig, images: int) -> bool:
    """Whether a CPU measures so many images sooner than it makes the program for them."""
    return on_cpu() and images * config.layout.num_tokens < _LONG


def without_ynnpack() -> dict[str, str]:
    """`compiler_options` of a program in which XLA makes everything itself; {} if not known."""
    return dict(_ALL_OWN) if on_cpu() and _known_here() else {}


@functools.cache
def _known_here() -> bool:
    """Whether this jaxlib takes the options; they are no promise of XLA's, its default changes."""
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10):
        return False  # not measured
    try:
        both = {_YNNPACK: ",".join([_OWN_PRODUCTS[_YNNPACK], _ALL_OWN[_YNNPACK]])}
        jax.jit(lambda: 0, compiler_options=both).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(
    batch: Callable[..., tuple[Any, int]], seldom: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], Program]:
    """Decorates a function as a `Program` with the `compiler_options` of a batch.

    Args:
      batch: model and number of images, from the function's arguments.
      seldom: as for `compiler_options`.
      **options: of `jax.jit`.
    """

    def told(*arguments: Any, **named: Any) -> dict[str, str]:
        return compiler_options(*batch(*arguments, **named), seldom=seldom)

    return lambda function: Program(function, told, **options)
