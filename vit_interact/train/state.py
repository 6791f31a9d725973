"""What a run carries from step to step, and how it is born where it will live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from jax.sharding import Mesh
from jaxtyping import Array

from vit_interact.models.vit import ViT
from vit_interact.train.sharding import state_sharding


@flax.struct.dataclass
class Running(metrics.Metric):
    """Sums over the steps since the last line of the log; with them a run goes on exactly."""

    loss: metrics.Average
    accuracy: metrics.Average
    grad_norm: metrics.Average
    unread: metrics.Average

    def merge(self, other: Running) -> Running:
        """Sums over the steps of both."""
        return jax.tree.map(jnp.add, self, other)


def no_metrics() -> Running:
    """Sums over nothing."""
    zero = metrics.Average(total=jnp.zeros((), jnp.float32), count=jnp.zeros((), jnp.float32))
    return Running(zero, zero, zero, zero)


class TrainState(flax.struct.PyTreeNode):
    """A run between two steps. A pytree: shapes and shardings may stand in its leaves, too.

    Random keys and the data's position follow from the seed and `step`, so they are not here.

    Attributes:
      step: steps done, int32.
      params: parameters, float32.
      opt_state: optax's.
      ema: averaged parameters, or None.
      running: sums for the log.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    running: Running

    @property
    def best_params(self) -> Any:
        """What is evaluated and exported: averaged parameters when there are any."""
        return self.params if self.ema is None else self.ema


def begin(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step; traceable."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: donated buffers must not be shared.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        running=no_metrics(),
    )


def param_shapes(model: ViT) -> Any:
    """Shapes and types of the model's parameters, without computing anything."""
    height, width = model.config.image_size
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def create_state(
    model: ViT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    ema: bool = False,
    loaded: Mapping[str, Any] | None = None,
) -> TrainState:
    """Makes the state, each array born on the devices that keep it.

    Args:
      model: the architecture.
      optimizer: from `make_optimizer`.
      mesh: from `make_mesh`.
      seed: of random parameters.
      ema: whether parameters are averaged.
      loaded: parameters to begin with; None draws random ones. They are copied.
    """
    abstract = abstract_state(model, optimizer, mesh, ema)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if loaded is None:

        def draw(key: Array) -> TrainState:
            height, width = model.config.image_size
            images = jnp.zeros((1, height, width, 3))
            return begin(model.init(key, images)["params"], optimizer, ema)

        return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
    placed = jax.tree.map(
        lambda array, place: jax.make_array_from_callback(
            array.shape, place, lambda index, array=array: array[index]
        ),
        dict(loaded),
        shardings.params,
    )
    return jax.jit(lambda params: begin(params, optimizer, ema), out_shardings=shardings)(placed)


def abstract_state(
    model: ViT, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool
) -> TrainState:
    """Shapes, types and shardings of the state."""
    shapes = jax.eval_shape(lambda params: begin(params, optimizer, ema), param_shapes(model))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_sharding(shapes, mesh),
    )
