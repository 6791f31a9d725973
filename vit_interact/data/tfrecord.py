"""TFRecord files by index, without TensorFlow.

A TFRecord file is a chain: each record says its length (8 bytes), a checksum (4), its content and
another checksum (4). Walking the chain once tells where each record begins, and from then on any
record is one read. So data sets that TFDS has prepared in its older format are as good for
shuffling by seed and step as those in ArrayRecord; a pass through tf.data would have to be replayed
to go on in the middle.
"""

from __future__ import annotations

import bisect
import itertools
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Some consecutive records of a file.

    Attributes:
      path: the file.
      skip: records before them.
      take: how many.
    """

    path: str
    skip: int
    take: int


class TFRecords:
    """Records of several files by one number; threads may share it.

    A file is walked when one of its records is first asked for.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Opens nothing yet.

        Args:
          pieces: in their order.
        """
        self._pieces = [piece for piece in pieces if piece.take]
        self._ends = list(itertools.accumulate(piece.take for piece in self._pieces))
        self._starts: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """The content of a record.

        Raises:
          IndexError: when there are not so many.
          RuntimeError: when the file is cut short or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        piece = self._pieces[number]
        place = index - (self._ends[number] - piece.take) + piece.skip
        starts = self._starts.get(piece.path)
        if starts is None:
            # Two threads may walk at once and find the same.
            starts = self._starts[piece.path] = _walk(piece.path)
        if place + 1 >= len(starts):
            raise RuntimeError(f"{piece.path} has {len(starts) - 1} whole records, not {place + 1}")
        length = starts[place + 1] - starts[place] - 16
        with open(piece.path, "rb") as file:
            file.seek(starts[place] + 12)
            return file.read(length)


def _walk(path: str) -> list[int]:
    """Where records begin, and where the last whole one ends."""
    size, starts = os.path.getsize(path), [0]
    with open(path, "rb", buffering=0) as file:
        while starts[-1] + 16 <= size:
            file.seek(starts[-1])
            (length,) = struct.unpack("<Q", file.read(8))
            end = starts[-1] + length + 16
            if end > size:
                break
            starts.append(end)
    return starts
