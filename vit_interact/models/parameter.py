"""Parameters of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Array],
    shape: tuple[int, ...],
    *more: Any,
) -> Float[Array, "..."]:
    """`module.param`, with the shape of what is there compared and not traced.

    Flax traces `init` for the shape each time that a module with parameters runs, which is half of
    what it takes to trace a ViT.

    Args:
      module: whose parameter it is, while it runs or is set up.
      name: of the parameter.
      init: takes a key, `shape` and `more`.
      shape: of the parameter.
      *more: for `init`, as the type of a new parameter; one that is there keeps its own.

    Raises:
      flax.errors.ScopeParamShapeError: when what is there has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, *more)
    value: Any = module.get_variable("params", name)
    if isinstance(value, meta.AxisMetadata):
        value = value.unbox()
    if jnp.shape(value) != shape:
        place = "/".join(module.path)
        raise flax.errors.ScopeParamShapeError(name, place, jnp.shape(value), shape)
    return value
