"""`vit-interact statistics`: from a checkpoint and images to a store, over all devices."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vit_interact.data.preprocess import Preprocess
from vit_interact.data.sources import Example, read_batches
from vit_interact.models.cpu import jit
from vit_interact.models.vit import ViT
from vit_interact.models.weights import Checkpoint
from vit_interact.survey.quantities import Design, observe, pool
from vit_interact.survey.store import check_same, load_survey, recover, save, to_dataset


class Survey:
    """One survey on disk. With several processes all make one; the first writes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        examples: Sequence[Example],
        design: Design,
        out: Path,
        data: str,
        skip: int = 0,
        batch_size: int = 8,
        resume: bool = False,
        devices: Sequence[jax.Device] | None = None,
        left_out: Sequence[Exception] = (),
        save_every: float = 30.0,
    ) -> None:
        """Opens the store; nothing is written before the first images are through.

        Args:
          checkpoint: from `load_checkpoint`.
          examples: from `open_examples`.
          design: what to survey.
          out: the store.
          data: the source's name, kept in the store.
          skip: place of the first example in the whole order.
          batch_size: images at a time, over all devices of all processes.
          resume: go on with what `out` holds.
          devices: to run on, by default all of all processes.
          left_out: errors of images in this stretch that cannot be read; the store names them.
          save_every: seconds; a kill loses no more work than that.

        Raises:
          ValueError: when `out` exists and is not to be resumed, or holds a survey of something
            else; when the batch does not divide over the devices; for more images than counts
            hold.
        """
        devices = list(devices or jax.devices())
        if batch_size % len(devices):
            raise ValueError(f"batch size {batch_size} does not divide over {len(devices)} devices")
        design.check_count(len(examples))
        self.checkpoint, self.examples, self.design, self.out = checkpoint, examples, design, out
        self.batch_size, self.skip, self.save_every = batch_size, skip, save_every
        self.mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        device = devices[0]
        self.about: dict[str, Any] = {
            "data": data,
            "ranges": [],
            "images": 0,
            "left_out": [str(error) for error in left_out],
            "model": checkpoint.source,
            "weights_sha256": checkpoint.sha256,
            "preprocess": checkpoint.preprocess.describe(),
            "pixels_per_patch": list(np.atleast_1d(checkpoint.model.config.patch_size).tolist()),
            "batch_size": batch_size,
            "device": f"{len(devices)} x {device.device_kind}",
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("vit-interact", "jax", "flax")
            },
        }
        self.statistics, self.done = jax.jit(design.empty)(), 0
        recover(out)
        if out.exists():
            if not resume:
                raise ValueError(f"{out} exists; use --resume to go on with it, or another --out")
            self._open()

    def _open(self) -> None:
        design, statistics, about = load_survey(self.out)
        # A store from before values were counted goes on without them.
        self.design = dataclasses.replace(self.design, values=design.values)
        check_same(design, about, self.design, self.about, self.out)
        ranges = about["ranges"]
        if len(ranges) != 1 or ranges[0][0] != self.skip or about["data"] != self.about["data"]:
            raise ValueError(f"{self.out} holds images {ranges} of {about['data']}; it goes on "
                             "with the same --data and --skip only")  # fmt: skip
        done = int(about["images"])
        if done > len(self.examples) or about["names_sha256"] != _digest(self.examples[:done]):
            raise ValueError(f"{self.out} holds {done} images that are not the first ones here")
        self.statistics, self.done = statistics, done

    def run(self, advance: Callable[[int], None] = lambda images: None) -> Any:
        """Surveys what is left, saving now and then, and gives the labelled dataset.

        Args:
          advance: called with a number of images when they are finished, or found finished.
        """
        everywhere, split = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, P("data"))
        params = jax.device_put(self.checkpoint.params, everywhere)
        statistics = jax.device_put(self.statistics, everywhere)
        fixed = {
            "design": self.design,
            "model": self.checkpoint.model,
            "preprocess": self.checkpoint.preprocess,
            "mesh": self.mesh,
        }
        left = self.examples[self.done :]
        advance(self.done)
        saved, behind = time.monotonic(), None
        own, real = _shares(left, self.batch_size)
        size = self.batch_size // jax.process_count()
        for number, batch in read_batches(own, self.checkpoint.preprocess, size):
            pictures = jax.make_array_from_process_local_data(split, batch.pictures)
            counted = jax.make_array_from_process_local_data(split, real[number])
            statistics, token = _step(statistics, params, pictures, counted, **fixed)
            if behind is not None:
                # One step behind, so that the device never waits and inputs do not pile up.
                behind.block_until_ready()
            behind = token
            images = min(self.batch_size, len(left) - number * self.batch_size)
            self.done += images
            if time.monotonic() - saved > self.save_every:
                self._save(statistics)
                saved = time.monotonic()
            advance(images)
        return self._save(statistics)

    def _save(self, statistics: Any) -> Any:
        self.statistics = jax.tree.map(np.asarray, jax.device_get(statistics))
        # Images that were left out have a place in the order of the data, too.
        gaps = len(self.about["left_out"]) if self.done == len(self.examples) else 0
        self.about |= {
            "ranges": [[self.skip, self.skip + self.done + gaps]],
            "images": self.done,
            "names_sha256": _digest(self.examples[: self.done]),
        }
        dataset = to_dataset(self.design, self.statistics, self.about)
        if jax.process_index() == 0:
            save(self.out, dataset)
        return dataset


@jit(
    batch=lambda *arrays, model, **_: (model, arrays[-1].shape[0]),
    static_argnames=("design", "model", "preprocess", "mesh"),
)
def _step(
    statistics: Any, params: Any, pictures: Array, real: Array,
    *, design: Design, model: ViT, preprocess: Preprocess, mesh: Mesh,
) -> tuple[Any, Array]:  # fmt: skip
    """Statistics with a batch added, and images so far.

    Images are split over devices; each pools its own, and Chan's merge joins them.
    """

    def local(statistics: Any, params: Any, pictures: Array, real: Array) -> Any:
        found = observe(design, model, params, preprocess.normalize(pictures))
        return pool(statistics, found, real, "data")

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(),
        check_vma=False,
    )  # fmt: skip
    after = split(statistics, params, pictures, real)
    return after, after["attention_distance"].count.max()


def _shares(left: Sequence[Example], batch_size: int) -> tuple[list[Example], list[np.ndarray]]:
    """This process's examples of every batch, padded, and which of them count."""
    size = batch_size // jax.process_count()
    own: list[Example] = []
    real = []
    for start in range(0, len(left), batch_size):
        first = start + jax.process_index() * size
        chunk = list(left[first : min(first + size, len(left))])
        own += chunk + [left[start]] * (size - len(chunk))
        real.append(np.arange(size) < len(chunk))
    return own, real


def _digest(examples: Sequence[Example]) -> str:
    text = "".join(f"{example.name}\n" for example in examples)
    return hashlib.sha256(os.fsencode(text)).hexdigest()
