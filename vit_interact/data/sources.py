"""Labelled photographs, in an order that no option but the data decides."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vit_interact.data.images import ImageError, decode_image, find_images, read_image
from vit_interact.data.labelled import class_folders
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.records import PREFIX, Records
from vit_interact.data.samples import sample_images

EMBEDDED = "embedded"
# Pillow decodes outside of the interpreter's lock.
WORKERS = min(4, os.cpu_count() or 1)
Watch = Callable[[Iterable[Any], int], Iterable[Any]]


class Example(NamedTuple):
    """One labelled image that could be read when it was opened.

    Attributes:
      name: class folder and file name, or data set, split and index; decides the order.
      label: class number of the model.
      size: of the encoded image in bytes; with another one it is another image.
      read: decodes it.
    """

    name: str
    label: int
    size: int
    read: Callable[[], Image.Image]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Decoded images, padded to a fixed number with copies of the first.

    Attributes:
      pictures: uint8 `[B, h, w, 3]`.
      labels: class numbers `[B]`.
      keys: each image's place in the order, `[B]`; seeds what is random about it.
      count: how many are not padding.
    """

    pictures: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    count: int


def open_examples(
    data: str | Path,
    class_names: Sequence[str] | None,
    outputs: int | None,
    skip: int = 0,
    limit: int | None = None,
    watch: Watch = lambda opened, total: opened,
) -> tuple[list[Example], list[ImageError]]:
    """Finds labelled images, ordered by a hash of their names, and decodes each one once.

    The hash makes any stretch of the order a fair sample, whatever seed is used later: `limit=893`
    to choose on and `skip=893` to report never overlap. An image that cannot be read keeps its
    place in that order, but is left out: decoding a photograph takes about a millisecond, and a
    long computation should not stop in the middle for it.

    Args:
      data: `embedded`, a folder of class folders, or `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`.
      class_names: of the model's outputs; when unknown, sorted folders are classes 0, 1, ..., and a
        TFDS data set has its own numbers.
      outputs: how many classes the model has; None when labels do not matter, so that a folder may
        hold its images in any way.
      skip: images to leave out from the front.
      limit: images to take after that, unreadable ones included; None takes all.
      watch: gets what is being opened, one image at a time, and their number, and gives it on.

    Returns:
      The examples, and what was left out.

    Raises:
      ValueError: for missing data, an empty class, a class that the model lacks, too few images, or
        when none can be read.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise ValueError(f"skip={skip}, limit={limit}: expected skip >= 0 and limit >= 1")
    if str(data).startswith(PREFIX):
        entries = _record_entries(str(data), class_names, outputs)
    else:
        entries = _file_entries(data, class_names, outputs)
    # Files of one name in folders below a class stay in the order of their paths.
    entries.sort(key=lambda entry: hashlib.sha256(os.fsencode(entry[0])).digest())
    wanted = len(entries) - skip if limit is None else limit
    if wanted < 1 or skip + wanted > len(entries):
        raise ValueError(
            f"{data} has {len(entries)} images; cannot skip {skip} and take {max(wanted, 1)}"
        )
    examples, left_out = [], []
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for opened in watch(pool.map(_open, entries[skip : skip + wanted]), wanted):
            if isinstance(opened, ImageError):
                left_out.append(opened)
            else:
                examples.append(opened)
    if not examples:
        raise ValueError(f"none of {wanted} images can be read; the first is {left_out[0]}")
    return examples, left_out


# The name, and what decodes the image once and returns the example or raises `ImageError`.
_Entry = tuple[str, Callable[[str], Example]]


def _open(entry: _Entry) -> Example | ImageError:
    name, load = entry
    try:
        return load(name)
    except ImageError as error:
        return error


def _file_entries(
    data: str | Path, class_names: Sequence[str] | None, outputs: int | None
) -> list[_Entry]:
    if str(data) == EMBEDDED:
        found = [(sample.label, sample.path) for sample in sample_images()]
    elif outputs is None:
        root = Path(data)
        if not root.is_dir():
            raise ValueError(f"{root}: expected '{EMBEDDED}', {PREFIX}NAME or a folder of images")
        found = [(path.parent.relative_to(root).as_posix(), path) for path in find_images([root])]
    else:
        if not Path(data).is_dir():
            raise ValueError(
                f"{data}: expected '{EMBEDDED}', {PREFIX}NAME or a folder with a folder for each "
                "class"
            )
        groups = class_folders(Path(data))
        found = [(name, path) for name, paths in groups.items() for path in paths]
    labels = sorted({label for label, _ in found})
    numbers = dict(zip(labels, _class_numbers(labels, class_names, outputs, data), strict=True))

    def load(name: str, path: Path, number: int) -> Example:
        read_image(path)
        return Example(name, number, path.stat().st_size, functools.partial(read_image, path))

    return [
        (f"{label}/{path.name}", functools.partial(load, path=path, number=numbers[label]))
        for label, path in found
    ]


def _record_entries(
    data: str, class_names: Sequence[str] | None, outputs: int | None
) -> list[_Entry]:
    records = Records(data)
    numbers = _class_numbers(records.class_names, class_names, outputs, data)

    def load(name: str, index: int) -> Example:
        content, label = records[index]
        decode_image(name, content)
        read = lambda: decode_image(name, records[index][0])  # noqa: E731
        return Example(name, numbers[label], len(content), read)

    return [
        (f"{records.name}/{index}", functools.partial(load, index=index))
        for index in range(len(records))
    ]


def _class_numbers(
    labels: Sequence[str], class_names: Sequence[str] | None, outputs: int | None, data: str | Path
) -> list[int]:
    """The model's class number of each of the data's classes; 0 when they do not matter."""
    if outputs is None:
        return [0] * len(labels)
    if class_names is None:
        if len(labels) != outputs:
            raise ValueError(
                f"{data} has {len(labels)} classes and the model {outputs} outputs without names"
            )
        return list(range(outputs))
    unknown = [label for label in labels if label not in class_names]
    if unknown:
        raise ValueError(
            f"{data} has {len(unknown)} classes that the model does not know, such as "
            f"'{unknown[0]}'; the model's begin with {', '.join(class_names[:3])}"
        )
    return [list(class_names).index(label) for label in labels]


def read_batches(
    examples: Sequence[Example],
    preprocess: Preprocess,
    batch_size: int,
    first_key: int = 0,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[int, Batch]]:
    """Decodes batches in threads, one batch ahead of who reads them.

    Args:
      examples: the first of what `open_examples` returns.
      preprocess: the model's.
      batch_size: images in a batch; the last one is padded.
      first_key: place of the first example in the whole order.
      only: numbers of the batches to read, increasing; None reads all.

    Yields:
      The number of the batch, and the batch.

    Raises:
      ImageError: for an image that could be read when it was opened and no longer can.
    """
    numbers = range(-(-len(examples) // batch_size)) if only is None else only
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        ahead: collections.deque[tuple[int, list[concurrent.futures.Future[np.ndarray]]]]
        ahead = collections.deque()
        queue = iter(numbers)

        def submit() -> None:
            for number in queue:
                chunk = examples[number * batch_size : (number + 1) * batch_size]
                ahead.append((number, [pool.submit(_read, one, preprocess) for one in chunk]))
                return

        submit()
        while ahead:
            submit()
            number, futures = ahead.popleft()
            pictures = [future.result() for future in futures]
            padding = batch_size - len(pictures)
            start = number * batch_size
            labels = [one.label for one in examples[start : start + len(pictures)]]
            yield (
                number,
                Batch(
                    np.stack(pictures + pictures[:1] * padding),
                    np.array(labels + labels[:1] * padding, np.int32),
                    first_key + start + np.arange(batch_size, dtype=np.int32),
                    len(futures),
                ),
            )


def _read(example: Example, preprocess: Preprocess) -> np.ndarray:
    return preprocess.picture(example.read())
