"""Data sets of TensorFlow Datasets on disk, read without TensorFlow."""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

import numpy as np

from vit_interact.data.images import ImageError
from vit_interact.data.tfrecord import Piece, TFRecords

PREFIX = "tfds:"
# Taken in this order when no split is named: ImageNet's `test` has no labels.
SPLITS = ("validation", "test")


class Records:
    """One split of a data set: encoded images and their classes by index.

    Attributes:
      name: data set, version and split.
      class_names: in the data set's order; numbers where it has no names.
    """

    def __init__(self, data: str) -> None:
        """Opens a data set that is prepared as ArrayRecord; never downloads anything.

        Args:
          data: `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`.

        Raises:
          ValueError: when a package or the data set is missing, is stored in another format or has
            no images with classes; says what to do.
        """
        tfds = _import()
        match = re.fullmatch(r"tfds:([\w./-]+(?::\d+\.\d+\.\d+)?)(?::(.+))?", data)
        if match is None:
            raise ValueError(f"{data}: expected tfds:NAME[/CONFIG][:VERSION][:SPLIT]")
        name, split = match.groups()
        folder = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        except tfds.core.registered.DatasetNotFoundError as error:
            raise ValueError(
                f"{data} is not prepared in {folder} (TFDS_DATA_DIR names another folder). Prepare "
                f"it with: {_prepare(name)}"
            ) from error
        except ImportError as error:  # buckets need packages of their own
            raise ValueError(f"{data} in {folder}: {error}") from error
        info = builder.info
        split = split or _default_split(data, tuple(info.splits))
        self.name = f"{info.full_name}/{split}"
        image = _feature(data, info, 0, tfds.features.Image)
        label = _feature(data, info, 1, tfds.features.ClassLabel)
        self.class_names = tuple(info.features[label].names)
        self._keys = image, label
        # Encoded images: decoded by TFDS they would need TensorFlow for some formats.
        decoders = {image: tfds.decode.SkipDecoding()}
        try:
            if info.file_format == tfds.core.FileFormat.TFRECORD:
                self._source = _Examples(info, split, decoders)
                return
            self._source = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{data} is stored as {info.file_format.value}, which has no random access. "
                "Convert it: pip install tensorflow apache-beam mlcroissant && "
                f"tfds convert_format --dataset_version_dir={os.fspath(builder.data_dir)} "
                "--out_file_format=array_record"
            ) from error
        except ValueError as error:
            raise ValueError(f"{data}: {error}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its class number; threads may share this.

        Raises:
          ImageError: for a record that cannot be read.
          ValueError: for an image without a class.
        """
        try:
            record = self._source[index]
        except RuntimeError as error:
            raise ImageError(f"{self.name}/{index}", f"cannot be read: {error}") from error
        image, label = (record[key] for key in self._keys)
        if label < 0:
            raise ValueError(f"{self.name}/{index} has no label: choose a split with labels")
        return image, int(label)


class _Examples:
    """A split that is stored as TFRecord, by index."""

    def __init__(self, info: Any, split: str, decoders: dict[str, Any]) -> None:
        self._features, self._decoders = info.features, decoders
        pieces = [
            Piece(os.fspath(one.filename), one.skip, one.take)
            for one in info.splits[split].file_instructions
        ]
        for piece in pieces:
            if not os.path.exists(piece.path):
                raise ValueError(
                    f"{piece.path} is not on a disk of this machine; TFRecord files are read from "
                    "disks only: copy or mount them, or convert them to ArrayRecord"
                )
        self._records = TFRecords(pieces)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return dict(self._features.deserialize_example_np(record, decoders=self._decoders))


def _import() -> Any:
    try:
        # TFDS imports it late, and says less when it is missing.
        importlib.import_module("array_record.python.array_record_data_source")
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ValueError(
            f"--data {PREFIX}NAME needs tensorflow-datasets and array_record ({error}): "
            'pip install "vit-interact[tfds]"'
        ) from error


def _prepare(name: str) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\" "
        "(most data sets need TensorFlow for that once: pip install tensorflow)"
    )


def _default_split(data: str, known: tuple[str, ...]) -> str:
    for split in (*SPLITS, *known[: len(known) == 1]):
        if split in known:
            return split
    raise ValueError(f"{data}: name a split, such as {data}:{known[0]}; it has {', '.join(known)}")


def _feature(data: str, info: Any, place: int, kind: Any) -> str:
    """The only feature of its kind, or the one that the data set itself calls input or target."""
    found = [
        key
        for key, feature in info.features.items()
        # Float images are stored as four bytes a pixel, which looks like RGBA.
        if type(feature) is kind and feature.np_dtype != np.float32
    ]
    supervised = (info.supervised_keys or (None, None))[place]
    if supervised in found:
        return str(supervised)
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} features of kind {kind.__name__}"
    raise ValueError(f"{data} has {what} and does not say which to use: expected one")
