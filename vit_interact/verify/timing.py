"""How long passes of a model under test take, whole, restricted and with patches deleted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_interact.data.preprocess import Preprocess
from vit_interact.data.sources import Batch, Example, read_batches
from vit_interact.verify import removal
from vit_interact.verify.run import Plan, Programs


def time_drop(
    programs: Programs, batch: Batch, share: float = 0.9, repeats: int = 3
) -> dict[str, float]:
    """How much faster the model runs when a share of the patches is really deleted."""
    pictures, _ = programs.put(batch)
    patches = programs.subject.layout.num_patches
    order = np.tile(np.arange(patches, dtype=np.int32), (len(batch.pictures), 1))
    order = jax.device_put(order, NamedSharding(programs.mesh, P("data")))
    count = removal.patches_left(share, programs.subject.layout)

    whole, cut = _seconds(
        batch, repeats,
        lambda: programs.base(pictures), lambda: programs.dropped(pictures, order, count),
    )  # fmt: skip
    return {"share": share, "whole_s_per_image": whole, "dropped_s_per_image": cut,
            "speed_up": whole / cut}  # fmt: skip


def time_windows(programs: Programs, batch: Batch, repeats: int = 3) -> dict[str, float]:
    """What a pass restricted to windows takes here, where they are a mask on dense attention."""
    pictures, _ = programs.put(batch)
    layout, depth = programs.subject.layout, programs.subject.depth
    box = np.array([0, 0, layout.rows, layout.cols], np.int32)
    boxes = np.broadcast_to(box, (depth, len(batch.pictures), layout.num_patches, 4))
    boxes = jax.device_put(boxes, NamedSharding(programs.mesh, P(None, "data")))
    whole, masked = _seconds(
        batch, repeats,
        lambda: programs.base(pictures), lambda: programs.restricted(pictures, boxes),
    )  # fmt: skip
    return {"whole_s_per_image": whole, "masked_s_per_image": masked, "ratio": masked / whole}


def _seconds(batch: Batch, repeats: int, *calls: Callable[[], Any]) -> list[float]:
    """Median seconds for an image of each call; they take turns, so that load falls on all."""
    for call in calls:
        jax.block_until_ready(call())
    times = np.zeros((repeats, len(calls)))
    for turn in times:
        for place, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            turn[place] = time.perf_counter() - start
    return [float(t) for t in np.median(times, axis=0) / len(batch.pictures)]


def measure_pass(programs: Programs, batch: Batch) -> float:
    """Seconds of one forward pass of one image, compiled; the base of a time estimate."""
    pictures, _ = programs.put(batch)
    jax.block_until_ready(programs.base(pictures))
    start = time.perf_counter()
    jax.block_until_ready(programs.base(pictures))
    return (time.perf_counter() - start) / len(batch.pictures)


def read_first(examples: Sequence[Example], preprocess: Preprocess, plan: Plan) -> Batch:
    """The first batch, for timing."""
    return next(read_batches(examples, preprocess, plan.batch_size, only=[0]))[1]
