"""The photographs of a run: which, how they are read, and how they reach the devices."""

from __future__ import annotations

import collections
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vit_interact.data.augment import Augment
from vit_interact.data.augment_host import augment_picture
from vit_interact.data.labelled import Labelled, Part, hold_out, open_split, take_few
from vit_interact.data.naming import visible
from vit_interact.data.pipeline import (
    Kept,
    Reading,
    batches,
    default_workers,
    steps_of,
    stretch,
)
from vit_interact.data.preprocess import Preprocess
from vit_interact.train.sharding import put_batch, replicated

Watch = Callable[[Iterable[Any], int], Iterable[Any]]


class Inputs:
    """Training and validation photographs.

    Attributes:
      train: photographs to train on.
      val: photographs to choose on, or None.
      class_names: of the labels.
    """

    def __init__(self, config: Any, given: Mapping[str, Labelled] | None = None) -> None:
        """Opens the splits; nothing is decoded.

        Args:
          config: the whole config.
          given: splits in memory or of the caller's own making, instead of `config.data.source`.

        Raises:
          ValueError: for what is not there, in one line.
        """
        self.config, self._given = config, given
        data = config.data
        if given is None and not data.source:
            raise ValueError("config.data.source is empty: a folder, tfds:NAME or a .npz file")
        self.train: Labelled = self._open(data.train, None)
        self.class_names = self.train.class_names
        if data.limit and data.limit < len(self.train):
            order = np.random.default_rng(config.seed).permutation(len(self.train))
            self.train = Part(self.train, np.sort(order[: data.limit]))
        self.val: Labelled | None = None
        if data.holdout:
            self.train, self.val = hold_out(self.train, data.holdout, config.seed)
        elif data.val:
            self.val = self._open(data.val, self.class_names)
        if data.per_class:
            self.train = take_few(self.train, data.per_class, config.seed)
        if config.batch_size > len(self.train):
            raise ValueError(
                f"config.batch_size={config.batch_size} is more than the {len(self.train)} "
                "images to train on"
            )

    def open_test(self) -> Labelled | None:
        """The split that is read once, or None."""
        name = self.config.data.test
        return self._open(name, self.class_names) if name else None

    def _open(self, split: str, class_names: tuple[str, ...] | None) -> Labelled:
        if self._given is None:
            return open_split(self.config.data.source, split, class_names)
        if split not in self._given:
            raise ValueError(f"there is no split '{split}' in the given data")
        found = self._given[split]
        if class_names is not None and found.class_names != class_names:
            raise ValueError(f"the classes of '{split}' are not those of training")
        return found


def make_augment(config: Any) -> Augment:
    """`config.augment` as the transforms know it.

    Raises:
      ValueError: for what cannot be.
    """
    fields = {name: value for name, value in config.items() if name != "where"}
    fields["crop"] = tuple(fields["crop"]) or None
    fields["ratio"] = tuple(fields["ratio"])
    return Augment(**fields)


def on_device(config: Any) -> bool:
    """Whether pictures are augmented by the devices.

    XLA's crops take a CPU as long as a small model's whole step; Pillow's don't.

    Raises:
      ValueError: when pictures are kept on the device and augmented on the host.
    """
    where = config.augment.where
    if where == "auto":
        cached = config.data.cache == "device"
        where = "device" if cached or jax.default_backend() != "cpu" else "host"
    if where == "host" and config.data.cache == "device":
        raise ValueError(
            "config.data.cache=device keeps pictures where the host cannot augment them: use "
            "config.data.cache=memory or config.augment.where=device"
        )
    return bool(where == "device")


class Feed:
    """Batches of training on the devices, from any step on.

    Attributes:
      store: all pictures on the device, uint8 `[n, h, w, 3]`, or None.
      kept_bytes: of pictures kept in memory.
    """

    def __init__(
        self,
        source: Labelled,
        config: Any,
        mesh: Mesh,
        size: tuple[int, int],
        watch: Watch = lambda items, total: items,
    ) -> None:
        """Decodes once what is to be kept.

        Args:
          source: photographs.
          config: the whole config.
          mesh: of the training.
          size: (height, width) that the model reads.
          watch: gets photographs that are decoded and their number, and gives them on.

        Raises:
          ValueError: when pictures cannot be read, or kept where they are asked to be.
        """
        self.config, self.mesh, self.store, self.kept_bytes = config, mesh, None, 0
        data, plan = config.data, make_augment(config.augment)
        device = on_device(config)
        # A margin, so that small crops are not blown up from too few pixels.
        side = data.side or math.ceil(max(size) * 8 / 7)
        self._size = (side, side) if device else size
        self._picture: Callable[..., np.ndarray] | None
        if device:
            self._picture = functools.partial(_stretched, size=self._size)
        else:
            self._picture = functools.partial(_augmented, plan=plan, size=size)
        workers = default_workers() if data.workers < 0 else data.workers
        self._source: Labelled = source
        if data.cache != "none":
            self._source = kept = Kept(source, side, data.threads, watch)
            self.kept_bytes = kept.bytes
            if data.corrupt == "error":
                for index in range(len(kept)):
                    kept.read(index)
            if data.cache == "device":
                self.store = jax.device_put(kept.stretched(self._size), replicated(mesh))
                self._picture = None
            # Sending them to worker processes would copy them all.
            workers = 0
        self._reading = Reading(workers, data.threads, corrupt=data.corrupt)
        self._unread: set[int] = set()

    def batches(self, steps: range) -> Iterator[dict[str, jax.Array]]:
        """Batches of these steps on the devices, two ahead of who reads them."""
        config = self.config
        found = batches(
            self._source, self._picture, self._size, config.batch_size, steps,
            seed=config.seed, reading=self._reading,
            process=(jax.process_index(), jax.process_count()),
        )  # fmt: skip
        named = _naming(found, self._source, self._unread)
        return _ahead(put_batch(self.mesh, batch) for batch in named)


def _stretched(
    image: Image.Image, generator: np.random.Generator, size: tuple[int, int]
) -> np.ndarray:
    del generator  # the device draws
    return stretch(image, size)


def _augmented(
    image: Image.Image, generator: np.random.Generator, plan: Augment, size: tuple[int, int]
) -> np.ndarray:
    return augment_picture(generator, image, plan, size)


def _as_evaluated(
    image: Image.Image, generator: np.random.Generator, preprocess: Preprocess
) -> np.ndarray:
    del generator
    return preprocess.picture(image)


class EvalFeed:
    """All photographs of a split, once, in order; the last batch is padded."""

    def __init__(self, source: Labelled, config: Any, mesh: Mesh, preprocess: Preprocess) -> None:
        """Decodes nothing yet.

        Args:
          source: photographs.
          config: the whole config.
          mesh: of the training.
          preprocess: of the model.
        """
        data = config.data
        ways = self._ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.mesh, self._source = mesh, source
        # Any number does: padding fills what the mesh does not divide.
        self.batch_size = math.ceil((config.eval.batch_size or config.batch_size) / ways) * ways
        self._preprocess = preprocess
        self._keep = data.cache != "none"
        self._kept: list[dict[str, np.ndarray]] | None = None
        workers = 0 if self._keep else default_workers() if data.workers < 0 else data.workers
        self._reading = Reading(workers, data.threads, corrupt=data.corrupt)
        self._unread: set[int] = set()

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches on the devices."""
        return _ahead(put_batch(self.mesh, batch) for batch in self._local())

    def first(self, count: int) -> dict[str, jax.Array]:
        """The first photographs, in one batch."""
        count = min(count, len(self._source))
        size = math.ceil(count / self._ways) * self._ways
        [batch] = self._read(size, Part(self._source, np.arange(count)))
        return put_batch(self.mesh, batch)

    def _local(self) -> Iterator[dict[str, np.ndarray]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for batch in self._read(self.batch_size, self._source):
            if self._keep:
                kept.append(batch)
            yield batch
        self._kept = kept if self._keep else None

    def _read(self, batch_size: int, source: Labelled) -> Iterator[dict[str, np.ndarray]]:
        found = batches(
            source, functools.partial(_as_evaluated, preprocess=self._preprocess),
            self._preprocess.size, batch_size, steps_of(len(source), batch_size), shuffle=False,
            reading=self._reading, process=(jax.process_index(), jax.process_count()),
        )  # fmt: skip
        return _naming(found, source, self._unread)


def _naming(
    found: Iterable[dict[str, np.ndarray]], source: Labelled, known: set[int], most: int = 20
) -> Iterator[dict[str, np.ndarray]]:
    """Says once which photographs could not be read; every host those that it met."""
    for batch in found:
        for index in batch["indices"][~batch["mask"]].tolist():
            if index < 0 or index in known:
                continue
            known.add(index)
            if len(known) <= most:
                print(f"warning: left out {visible(source.name(index))}", file=sys.stderr)
            if len(known) == most:
                print("warning: more that are left out are only counted", file=sys.stderr)
        yield batch


def _ahead(items: Iterable[Any], count: int = 2) -> Iterator[Any]:
    """Items, so many of them begun before they are asked for."""
    queue: collections.deque[Any] = collections.deque()
    for item in items:
        queue.append(item)
        if len(queue) > count:
            yield queue.popleft()
    yield from queue
