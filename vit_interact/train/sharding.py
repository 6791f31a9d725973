"""One mesh of three axes, and where each parameter lies on it.

`data` and `fsdp` split the batch; `fsdp` also splits parameters and optimiser state; `model` splits
heads and the MLP's hidden units, so that a block needs one sum over devices for each of its halves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"))
# Smaller parameters are not worth the messages.
_SMALL = 2**14

# Dimensions that the axis `model` splits, counted from the end: a scanned model has one more first.
_TENSOR = (
    (r"MultiHeadDotProductAttention_0/(query|key|value)/kernel$", -2),
    (r"MultiHeadDotProductAttention_0/(query|key|value)/bias$", -2),
    (r"MultiHeadDotProductAttention_0/out/kernel$", -3),
    (r"MlpBlock_0/Dense_0/kernel$", -1),
    (r"MlpBlock_0/Dense_0/bias$", -1),
    (r"MlpBlock_0/Dense_1/kernel$", -2),
)


def make_mesh(
    strategy: str = "replicate",
    fsdp: int = 0,
    model: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of all devices of all processes.

    Args:
      strategy: `replicate`, `fsdp` or `tensor`.
      fsdp: devices along that axis; 0 takes all that are left under `fsdp`, else 1.
      model: devices along that axis; 0 takes all that are left under `tensor`, else 1.
      devices: to use instead of all.

    Raises:
      ValueError: when the axes do not divide the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    model = model or (count // max(fsdp, 1) if strategy == "tensor" else 1)
    fsdp = fsdp or (count // model if strategy == "fsdp" else 1)
    data, rest = divmod(count, fsdp * model)
    if rest or not data:
        raise ValueError(
            f"{count} devices do not divide into config.sharding.fsdp={fsdp} times "
            f"config.sharding.model={model}"
        )
    # Explicit axes break linen at the class token.
    kinds = (AxisType.Auto,) * 3
    names = ("data", "fsdp", "model")
    return jax.make_mesh((data, fsdp, model), names, axis_types=kinds, devices=devices)


def check_mesh(mesh: Mesh, batch_size: int, parts: int, heads: int) -> None:
    """Refuses a batch or a number of heads that the mesh does not divide.

    Raises:
      ValueError: in one line.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch_size // parts) % ways:
        part = f" in {parts} parts" if parts > 1 else ""
        raise ValueError(
            f"a batch of {batch_size}{part} does not divide over {ways} devices (mesh axes data "
            f"and fsdp); the next that does is {-(-batch_size // (ways * parts)) * ways * parts}"
        )
    if heads % mesh.shape["model"]:
        raise ValueError(
            f"{heads} heads do not divide over config.sharding.model={mesh.shape['model']} devices"
        )


def path_of(keys: Any) -> str:
    """The path of a leaf, such as `params/head/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where a parameter, or what the optimiser keeps for it, lies.

    Args:
      path: ends like the parameter's own.
      shape: of the array.
      mesh: from `make_mesh`.
    """
    axes: list[str | None] = [None] * len(shape)
    ways = mesh.shape["model"]
    for pattern, dim in _TENSOR:
        # The pooling head attends with one query; splitting it gains nothing.
        if "MAPHead" in path or ways == 1:
            break
        if re.search(pattern, path) and len(shape) >= -dim and shape[dim] % ways == 0:
            axes[dim] = "model"
    ways = mesh.shape["fsdp"]
    if ways > 1 and math.prod(shape) >= _SMALL:
        # Of the dimensions that divide, the largest.
        free = [d for d in range(len(shape)) if axes[d] is None and shape[d] % ways == 0]
        if free:
            axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*axes)


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every leaf of a state.

    Args:
      shapes: a tree of arrays or `ShapeDtypeStruct`.
      mesh: from `make_mesh`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, spec_of(path_of(keys), leaf.shape, mesh)), shapes
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, as part of the global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
        for name, array in local.items()
    }
