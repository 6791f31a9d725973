"""Finished parts of a long verification on disk; a kill loses at most the part in work."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RECORD = "verify_options.json"
# Tests whose parts depend on all batches and not on their own alone.
WHOLE = ("data",)


class Parts:
    """A folder of finished parts, each a small `.npz` that appears whole or not at all."""

    def __init__(self, out: Path, options: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Opens or makes the folder.

        Args:
          out: the output folder; parts go to `out/parts`.
          options: JSON-safe; parts of other options do not mix.
          tags: for each batch, a hash of what is in it: with more images later, batches that stay
            the same stay finished.

        Raises:
          ValueError: when `out` is a file, somebody else's, or holds other options.
        """
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; --out needs a folder")
        self.folder, self.tags = out / "parts", tuple(tags)
        self.average = Average(self.folder / "average.npz", self.tags)
        record = out / RECORD
        options = json.loads(json.dumps(options))
        if record.exists():
            try:
                known = json.loads(record.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{record} is damaged; use another --out") from error
            differs = [key for key in options if known.get(key) != options[key]]
            if differs:
                raise ValueError(
                    f"{out} holds a verification with other {', '.join(differs)}; use another --out"
                )
        elif self.folder.exists() or (out / "verify.json").exists():
            raise ValueError(f"{out} holds results without {RECORD}; use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(record, json.dumps(options, indent=1))

    def path(self, test: str, subject: str, batch: int) -> Path:
        """Where a part is or will be."""
        tag = self.tags[batch]
        if test in WHOLE:
            tag += "-" + _digest(self.tags)[:10]
        return self.folder / f"{test}-{subject}-{batch:05d}-{tag}.npz"

    def has(self, test: str, subject: str, batch: int) -> bool:
        """Whether a part is finished."""
        if test == "average":
            return batch < self.average.batches
        return self.path(test, subject, batch).exists()

    def save(self, test: str, subject: str, batch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part."""
        if test == "average":
            return self.average.add(arrays["views"], int(arrays["images"]))
        return replace_arrays(self.path(test, subject, batch), arrays)

    def load(self, test: str, subject: str) -> dict[str, np.ndarray]:
        """All batches of a part, joined along the last axis, that of images."""
        parts = []
        for batch in range(len(self.tags)):
            with np.load(self.path(test, subject, batch), allow_pickle=False) as file:
                parts.append({name: file[name] for name in file.files})
        return {name: np.concatenate([p[name] for p in parts], axis=-1) for name in parts[0]}


class Average:
    """Mean over images of what all of them share; one file, replaced after every batch.

    Attributes:
      batches: how many of the data's batches are in it; they come in order.
    """

    def __init__(self, path: Path, tags: Sequence[str]) -> None:
        """Goes on from the file, if it is of the first batches of this data."""
        self._path, self._tags = path, tuple(tags)
        self.batches, self._images, self._sums = 0, 0, np.zeros(())
        try:
            with np.load(path, allow_pickle=False) as file:
                known = int(file["batches"])
                if known <= len(tags) and str(file["tags"]) == _digest(self._tags[:known]):
                    self.batches, self._images = known, int(file["images"])
                    self._sums = file["sums"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # nothing yet, or damaged: begin anew

    def add(self, views: np.ndarray, images: int) -> None:
        """Adds the sum over the next batch's images."""
        self._sums, self.batches = self._sums + views.astype(np.float64), self.batches + 1
        self._images += images
        replace_arrays(
            self._path,
            {
                "sums": self._sums,
                "batches": np.int64(self.batches),
                "images": np.int64(self._images),
                "tags": np.str_(_digest(self._tags[: self.batches])),
            },
        )

    def mean(self) -> np.ndarray:
        """Mean over the images so far, float32."""
        return (self._sums / max(self._images, 1)).astype(np.float32)


def _digest(tags: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(tags).encode()).hexdigest()


def replace_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes an `.npz` so that it is never seen half-written."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(unfinished, path)


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half-written."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)
