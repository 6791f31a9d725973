"""Names that tell images apart, and hashes that tell whether they have changed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Work(NamedTuple):
    """One image to analyse."""

    name: str
    path: Path
    sha256: str


def name_files(
    files: Sequence[Path], done: dict[str, str], failures: list[tuple[str, str]]
) -> Iterator[Work]:
    """Names images by their path below the deepest folder that holds them all.

    Args:
      files: the images.
      done: name to SHA-256 of images that have been dealt with; another content gets another name.
      failures: gets (file, reason) of what cannot be read.
    """
    absolute = {path.absolute(): path for path in files}
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    for full, path in absolute.items():
        # Names that are not UTF-8 exist on Linux; neither zarr nor terminals take them.
        name = visible(full.relative_to(root).as_posix())
        try:
            # Opening a pipe would wait for ever, and a device never ends.
            if not stat.S_ISREG(path.stat().st_mode):
                failures.append((visible(str(path)), "is no regular file; expected an image file"))
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            failures.append((visible(str(path)), (error.strerror or "cannot be read").lower()))
            continue
        if done.get(name, digest) != digest:
            # Another file of that name is in the folder already, or this one has changed.
            name = f"{name} ({digest[:8]})"
        yield Work(name, path, digest)


def visible(text: str) -> str:
    """Text that UTF-8 can hold: undecodable bytes of file names as backslash codes."""
    return text.encode("utf-8", "backslashreplace").decode()


def slug(image_id: str) -> str:
    """A folder name for an image: readable, safe on every file system, and its own.

    Args:
      image_id: any text, such as a file name with its folders.

    Returns:
      Lower-case ASCII letters, digits, `-` and `_`, at most 57 characters: what is left of the
      name, and 12 hexadecimal digits of its SHA-256, which keep `a/1.jpg` apart from `a_1.jpg`
      and `A.jpg` from `a.jpg`.
    """
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    words = re.sub(r"[^a-z0-9_]+", "-", image_id.lower().encode("ascii", "ignore").decode())
    return "-".join(part for part in (words[-44:].strip("-_"), digest) if part)
