"""Labelled photographs by index, for training: nothing is decoded before it is asked for."""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vit_interact.data.images import decode_image, find_images, read_image
from vit_interact.data.records import PREFIX, Records

# What people call the folders of splits.
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@runtime_checkable
class Labelled(Protocol):
    """Random access to labelled photographs; threads and worker processes may share it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class number of each photograph, or None where only reading tells."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call a photograph."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The photograph in RGB and its class number.

        Raises:
          ImageError: for one that cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files with a class each; see `Labelled`."""

    paths: Sequence[Path]
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Decodes the file."""
        return read_image(self.paths[index]), int(self.labels[index])


class Arrays:
    """Photographs in memory, uint8 `[n, h, w, 3]`; see `Labelled`."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None
    ) -> None:
        """Checks shapes and types.

        Raises:
          ValueError: for arrays that are not photographs with labels.
        """
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; expected uint8 [n, h, w, 3]"
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)}; expected one whole number for "
                f"each of {len(images)} images"
            )
        if not len(labels):
            raise ValueError("there are no images")
        if class_names is None:
            class_names = tuple(str(number) for number in range(int(labels.max()) + 1))
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(
                f"labels run from {labels.min()} to {labels.max()}; there are {len(class_names)} "
                "classes"
            )
        self.images, self.labels = images, labels
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The photograph."""
        return Image.fromarray(self.images[index]), int(self.labels[index])


class Prepared:
    """One split of a TFDS data set that is prepared as ArrayRecord; see `Labelled`."""

    labels = None

    def __init__(self, data: str) -> None:
        self.data = data
        self._records: Records | None = Records(data)
        self.class_names = self._records.class_names
        self._count = len(self._records)

    def __getstate__(self) -> dict[str, object]:
        # Open files don't travel to worker processes: each opens its own.
        return {**self.__dict__, "_records": None}

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """Data set, split and index."""
        return f"{self.data}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Decodes the record."""
        if self._records is None:
            self._records = Records(self.data)
        content, label = self._records[index]
        return decode_image(self.name(index), content), label


@dataclasses.dataclass(frozen=True)
class Part:
    """Some photographs of another source; see `Labelled`."""

    whole: Labelled
    indices: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.class_names

    @property
    def labels(self) -> np.ndarray | None:
        """Labels of the part."""
        return None if self.whole.labels is None else self.whole.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """As the whole calls it."""
        return self.whole.name(int(self.indices[index]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        """As the whole reads it."""
        return self.whole.read(int(self.indices[index]))


def open_split(
    data: str | Path, split: str, class_names: Sequence[str] | None = None
) -> Files | Arrays | Prepared:
    """Opens one split by name.

    Args:
      data: `tfds:NAME[/CONFIG][:VERSION]`, a folder with a folder for each split, each with one
        for each class, a folder of class folders (only split `train`), or a `.npz` file with
        `SPLIT_images`, `SPLIT_labels` and perhaps `class_names`.
      split: `train`, `val` or `test`, or for TFDS anything that it understands.
      class_names: that training uses; a class that is not among them is refused.

    Raises:
      ValueError: for what is not there, in one line.
    """
    if str(data).startswith(PREFIX):
        found: Files | Arrays | Prepared = Prepared(f"{data}:{split}")
    elif Path(data).suffix == ".npz":
        found = _open_npz(Path(data), split)
    else:
        found = _open_folder(Path(data), split, class_names)
    known = found.class_names if class_names is None else tuple(class_names)
    if found.class_names != known:
        raise ValueError(
            f"{data}: the classes of {split} are not those of training "
            f"({len(found.class_names)} and {len(known)})"
        )
    return found


def split_folders(root: Path) -> dict[str, Path]:
    """Which folder holds which split; empty when the root has class folders itself.

    A folder is a split when it has the name of one and holds folders, so that a class may be
    called `test`.

    Raises:
      ValueError: when there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(
            f"{root}: expected {PREFIX}NAME, a .npz file or a folder with class folders"
        )
    found: dict[str, Path] = {}
    for split, names in _SPLITS.items():
        for name in names:
            folder = root / name
            if folder.is_dir() and any(child.is_dir() for child in folder.iterdir()):
                found.setdefault(split, folder)
    return found if "train" in found else {}


def _open_folder(root: Path, split: str, class_names: Sequence[str] | None) -> Files:
    splits = split_folders(root)
    if splits and split not in splits:
        raise ValueError(
            f"{root} has no folder for split '{split}'; it has {', '.join(sorted(splits))}"
        )
    if not splits and split != "train":
        raise ValueError(
            f"{root} has no folders for splits: set config.data.holdout, or sort the images into "
            f"{root}/train/CLASS and {root}/{split}/CLASS"
        )
    folder = splits.get(split, root)
    groups = class_folders(folder)
    known = list(groups) if class_names is None else list(class_names)
    for name in groups:
        if name not in known:
            raise ValueError(
                f"{folder / name}: this class is not in training; remove the folder, or add "
                "images of it to the training split"
            )
    paths = list(itertools.chain.from_iterable(groups.values()))
    labels = np.repeat([known.index(name) for name in groups], [len(g) for g in groups.values()])
    return Files(paths, labels.astype(np.int32), tuple(known))


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class folders, sorted by name, with the images in each.

    Raises:
      ValueError: for a missing or empty folder, or an empty class.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: expected {PREFIX}NAME or a folder with a folder for each class")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} has no class folders; expected {root}/CLASS/IMAGE.jpg")
    found = {}
    for folder in folders:
        if not any(folder.iterdir()):
            raise ValueError(f"{folder} is an empty class: remove the folder or add images")
        found[folder.name] = find_images([folder])
    return found


def _open_npz(path: Path, split: str) -> Arrays:
    if path.exists() and not zipfile.is_zipfile(path):
        # np.load would take it for a pickle, and advise to trust it.
        raise ValueError(f"{path} is no .npz file; make one with np.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            if f"{split}_images" not in file or f"{split}_labels" not in file:
                raise ValueError(
                    f"{path} has no arrays {split}_images and {split}_labels; it has "
                    f"{', '.join(file.files)}"
                )
            names = [str(name) for name in file["class_names"]] if "class_names" in file else None
            return Arrays(file[f"{split}_images"], file[f"{split}_labels"], names)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def hold_out(source: Labelled, share: float, seed: int) -> tuple[Part, Part]:
    """Splits at random: what stays and what is held out.

    With labels known, each class gives its share, so that small classes are in both parts.

    Args:
      source: photographs.
      share: of them to hold out, in (0, 1).
      seed: another one holds out others.

    Raises:
      ValueError: when nothing would stay or be held out.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(source))
    if source.labels is None:
        held = order[: round(share * len(source))]
    else:
        labels = source.labels[order]
        # Ties of rounding go to training.
        held = np.concatenate(
            [
                order[labels == label][: int(share * np.sum(labels == label) + 0.499)]
                for label in np.unique(labels)
            ]
        )
    if not 0 < len(held) < len(source):
        raise ValueError(f"holding out {share} of {len(source)} images leaves one part empty")
    keep = np.ones(len(source), bool)
    keep[held] = False
    return Part(source, np.flatnonzero(keep)), Part(source, np.sort(held))


def take_few(source: Labelled, each: int, seed: int) -> Part:
    """So many photographs of each class at random, or all of a class that has fewer.

    Args:
      source: photographs.
      each: of a class.
      seed: another one takes others.

    Raises:
      ValueError: when labels are known only by reading.
    """
    if source.labels is None:
        raise ValueError("config.data.per_class: the classes of this data set are not known ahead")
    order = np.random.default_rng(seed).permutation(len(source))
    labels = source.labels[order]
    few = [order[labels == label][:each] for label in np.unique(labels)]
    return Part(source, np.sort(np.concatenate(few)))
