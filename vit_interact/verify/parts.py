"""Finished parts of a long verification on disk; a kill loses at most the part in work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RECORD = "verify_options.json"


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
        return self.folder / f"{test}-{subject}-{batch:05d}-{self.tags[batch]}.npz"

    def has(self, test: str, subject: str, batch: int) -> bool:
        """Whether a part is finished."""
        return self.path(test, subject, batch).exists()

    def save(self, test: str, subject: str, batch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part."""
        path = self.path(test, subject, batch)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(unfinished, path)

    def load(self, test: str, subject: str) -> dict[str, np.ndarray]:
        """All batches of a part, joined along the last axis, that of images."""
        parts = []
        for batch in range(len(self.tags)):
            with np.load(self.path(test, subject, batch), allow_pickle=False) as file:
                parts.append({name: file[name] for name in file.files})
        return {name: np.concatenate([p[name] for p in parts], axis=-1) for name in parts[0]}


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half-written."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)
