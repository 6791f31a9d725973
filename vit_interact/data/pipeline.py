"""Batches for training and evaluation by grain: what a step sees depends on seed and step alone.

Photographs form one endless stream, epoch after epoch, each epoch in an order of its own. Step `s`
of batches of `B` reads places `s B` to `(s + 1) B - 1`, and process `p` of `n` the `p`-th of `n`
equal stretches of them. So a run goes on at any step, with other workers or on more machines, and
sees what it would have seen; the data's position in a checkpoint is the step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from vit_interact.data.images import ImageError
from vit_interact.data.labelled import Labelled
from vit_interact.processes import end_with_parent

CORRUPT = ("skip", "error")

Picture = Callable[[Image.Image, np.random.Generator], np.ndarray]
"""Makes uint8 `[h, w, 3]` of a fixed size of a photograph; the generator is that place's own."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How photographs are read.

    Attributes:
      workers: processes; 0 reads in threads of this one, which is right for data in memory.
      threads: in each process, or here.
      ahead: batches to have ready for each worker.
      corrupt: `skip` leaves a place empty (its `mask` is False); `error` stops.
    """

    workers: int = 0
    threads: int = 4
    ahead: int = 2
    corrupt: str = "skip"

    def __post_init__(self) -> None:
        if self.corrupt not in CORRUPT:
            raise ValueError(f"corrupt={self.corrupt!r}: expected one of {', '.join(CORRUPT)}")
        if self.workers < 0 or self.threads < 1 or self.ahead < 1:
            raise ValueError("workers must be at least 0, threads and ahead at least 1")


@dataclasses.dataclass(frozen=True)
class _Load:
    """Reads one place of the stream; sent to worker processes."""

    source: Labelled
    picture: Picture | None
    empty: np.ndarray
    reading: Reading
    seed: int
    shuffle: bool
    # Global batch, this process's part of it, and where that part begins.
    batch: int
    local: int
    offset: int

    def __call__(self, index: int) -> dict[str, Any]:
        """The photograph at a place of this process's own stream."""
        _tie_worker()
        step, inside = divmod(int(index), self.local)
        place = step * self.batch + self.offset + inside
        epoch, number = divmod(place, len(self.source))
        if self.shuffle:
            number = int(_permutation(len(self.source), self.seed, epoch)[number])
        elif epoch:
            return self._nothing(-1)
        try:
            if self.picture is None:
                return self._number(number)
            image, label = self.source.read(number)
            generator = np.random.default_rng((self.seed, 1, place))
            return {
                "pictures": self.picture(image, generator),
                "sizes": np.array([image.height, image.width], np.int32),
                "labels": np.int32(label),
                "mask": np.bool_(True),
                "indices": np.int32(number),
            }
        except ImageError:
            if self.reading.corrupt == "error":
                raise
            return self._nothing(number)

    def _number(self, number: int) -> dict[str, Any]:
        """A place whose pixels are on the device already."""
        assert isinstance(self.source, Kept)
        return {
            "sizes": np.array(self.source.size(number), np.int32),
            "labels": np.int32(self.source.labels[number]),
            "mask": np.bool_(self.source.readable(number)),
            "indices": np.int32(number),
        }

    def _nothing(self, number: int) -> dict[str, Any]:
        """An empty place: padding (-1), or a photograph that cannot be read."""
        return {
            "pictures": self.empty,
            "sizes": np.array(self.empty.shape[:2], np.int32),
            "labels": np.int32(0),
            "mask": np.bool_(False),
            "indices": np.int32(number),
        }


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


@functools.cache
def _tie_worker() -> None:
    # grain's workers survive a parent that is killed, and keep its memory and its terminal.
    end_with_parent()


def batches(
    source: Labelled,
    picture: Picture | None,
    size: tuple[int, int],
    batch_size: int,
    steps: range,
    *,
    seed: int = 0,
    shuffle: bool = True,
    reading: Reading = Reading(),
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of each batch.

    Args:
      source: photographs.
      picture: makes pixels of a photograph, with a random generator that belongs to the place; None
        leaves `pictures` out, for photographs that are `Kept` and on the device.
      size: (height, width) of what `picture` returns.
      batch_size: of all processes together.
      steps: the batches to read.
      seed: of order and generators.
      shuffle: an endless stream in random order; otherwise once through in the source's order, and
        places after the end are empty.
      reading: workers and what to do about damaged files.
      process: this process's number and how many there are.

    Yields:
      `pictures` uint8 `[b, h, w, 3]`, `sizes` of the originals int32 `[b, 2]`, `labels` int32
      `[b]`, `mask` bool `[b]` (False for an empty place) and `indices` int32 `[b]` in the source
      (-1 for padding).

    Raises:
      ValueError: when processes do not divide the batch.
      ImageError: for a damaged photograph when `reading` says so.
    """
    import grain

    index, count = process
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of {count} processes")
    local = batch_size // count
    load = _Load(
        source, picture, np.zeros((*size, 3), np.uint8), reading, seed, shuffle,
        batch_size, local, index * local,
    )  # fmt: skip
    stream = grain.MapDataset.range(steps.start * local, steps.stop * local).map(load).batch(local)
    options = grain.ReadOptions(
        num_threads=reading.threads, prefetch_buffer_size=reading.threads + reading.ahead
    )
    iterable = stream.to_iter_dataset(options)
    if reading.workers:
        _parse_flags()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=reading.workers, per_worker_buffer_size=reading.ahead
            )
        )
    # Closed even when a run stops early: workers and shared memory go before the program ends.
    with contextlib.closing(iter(iterable)) as iterator:
        for batch in iterator:
            if reading.workers:
                # Their arrays lie in shared memory, which devices may not hold on to.
                batch = {name: np.array(array) for name, array in batch.items()}
            yield batch


def _parse_flags() -> None:
    """Grain's workers read absl flags, which nobody has parsed in a notebook."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["vit_interact"])


def steps_of(count: int, batch_size: int) -> range:
    """Steps that go once through so many photographs; the last batch is padded."""
    return range(-(-count // batch_size))


class Kept:
    """Photographs decoded once and kept in memory; see `Labelled`.

    Attributes:
      class_names: of the labels.
      labels: class numbers; 0 where a photograph is damaged.
      bytes: memory that the pixels take.
    """

    def __init__(
        self,
        source: Labelled,
        side: int,
        threads: int = 4,
        watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
    ) -> None:
        """Decodes everything.

        Args:
          source: photographs.
          side: a photograph whose shorter side is longer than this is shrunk to it.
          threads: that decode.
          watch: gets the decoded photographs and their number, and gives them on.
        """
        self._source, self.class_names = source, source.class_names
        read = functools.partial(_read_shrunk, source, side)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            self._kept = list(watch(pool.map(read, range(len(source))), len(source)))
        labels = [0 if isinstance(one, ImageError) else one[1] for one in self._kept]
        self.labels = np.array(labels, np.int32)
        self.bytes = sum(0 if isinstance(one, ImageError) else one[0].nbytes for one in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self._source.name(index)

    def readable(self, index: int) -> bool:
        """Whether the photograph could be decoded."""
        return not isinstance(self._kept[index], ImageError)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width); of a damaged photograph (1, 1)."""
        kept = self._kept[index]
        return (1, 1) if isinstance(kept, ImageError) else kept[0].shape[:2]

    def stretched(self, size: tuple[int, int]) -> np.ndarray:
        """All of them at one size, uint8 `[n, h, w, 3]`; damaged ones are black."""
        pictures = np.zeros((len(self), *size, 3), np.uint8)
        for index in range(len(self)):
            if self.readable(index):
                pictures[index] = stretch(self.read(index)[0], size)
        return pictures

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The photograph, without decoding it again."""
        kept = self._kept[index]
        if isinstance(kept, ImageError):
            raise kept
        pixels, label = kept
        return Image.fromarray(pixels), label


def _read_shrunk(source: Labelled, side: int, index: int) -> tuple[np.ndarray, int] | ImageError:
    try:
        image, label = source.read(index)
    except ImageError as error:
        return error
    scale = side / min(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image), label


def stretch(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The whole photograph at one size, whatever its aspect: uint8 `[h, w, 3]`."""
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def default_workers() -> int:
    """Worker processes that leave the trainer two cores of its own."""
    return min(16, max(0, (os.cpu_count() or 1) - 2))
