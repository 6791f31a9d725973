"""What a run carries from step to step, and how it is born where it will live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Sums over the steps since the last line of the log; with them a run goes on exactly.

    `windows` holds averages that a window-free transformer has beside: `area` by layer, and with
    guidance `guidance` and `iou`. (Orbax puts other things in the place of an empty dict.)
    """

    loss: metrics.Average
    accuracy: metrics.Average
    grad_norm: metrics.Average
    unread: metrics.Average
    windows: Any

    def merge(self, other: Running) -> Running:
        """Sums over the steps of both."""
        return jax.tree.map(jnp.add, self, other)


def no_metrics(windows: int = 0, guided: bool = False) -> Running:
    """Sums over nothing.

    Args:
      windows: layers that predict windows.
      guided: whether a guide teaches them.
    """
    zero = metrics.Average(total=jnp.zeros((), jnp.float32), count=jnp.zeros((), jnp.float32))
    beside = {"area": zero.replace(total=jnp.zeros(windows))} if windows else {}
    beside |= {"guidance": zero, "iou": zero} if guided else {}
    return Running(zero, zero, zero, zero, beside)


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


def begin(
    params: Any,
    optimizer: optax.GradientTransformation,
    ema: bool,
    running: Running | None = None,
) -> TrainState:
    """The state before the first step; traceable. `running` holds other sums than the usual."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: donated buffers must not be shared.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        running=no_metrics() if running is None else running,
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
    running: Running | None = None,
    prepare: Callable[[Any], Any] = lambda params: params,
) -> TrainState:
    """Makes the state, each array born on the devices that keep it.

    Args:
      model: the architecture.
      optimizer: from `make_optimizer`.
      mesh: from `make_mesh`.
      seed: of random parameters.
      ema: whether parameters are averaged.
      loaded: parameters to begin with; None draws random ones. They are copied.
      running: sums over nothing; None for the usual ones.
      prepare: changes parameters before the first step; traceable.
    """
    abstract = abstract_state(model, optimizer, mesh, ema, running)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if loaded is None:

        def draw(key: Array) -> TrainState:
            height, width = model.config.image_size
            images = jnp.zeros((1, height, width, 3))
            drawn = prepare(model.init(key, images)["params"])
            return begin(drawn, optimizer, ema, running)

        return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
    placed = jax.tree.map(
        lambda array, place: jax.make_array_from_callback(
            array.shape, place, lambda index, array=array: array[index]
        ),
        dict(loaded),
        shardings.params,
    )

    def start(params: Any) -> TrainState:
        return begin(prepare(params), optimizer, ema, running)

    return jax.jit(start, out_shardings=shardings)(placed)


def abstract_state(
    model: ViT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema: bool,
    running: Running | None = None,
) -> TrainState:
    """Shapes, types and shardings of the state."""

    def start(params: Any) -> TrainState:
        return begin(params, optimizer, ema, running)

    shapes = jax.eval_shape(start, param_shapes(model))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_sharding(shapes, mesh),
    )
