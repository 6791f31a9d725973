"""Where figures go: `metrics.jsonl` always, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LINES = "metrics.jsonl"


class Log:
    """The log of a run; only the first process writes."""

    def __init__(self, workdir: Path, step: int, tensorboard: bool, writes: bool = True) -> None:
        """Opens the log; lines of steps after `step`, of a session that was killed, are dropped.

        Args:
          workdir: folder of the run.
          step: that the run goes on from.
          tensorboard: whether to write event files.
          writes: False for all processes but one.
        """
        self.path, self.writes = workdir / LINES, writes
        self._board: Any = None
        self._artist = concurrent.futures.ThreadPoolExecutor(1)
        self._drawing: list[concurrent.futures.Future[None]] = []
        if not writes:
            return
        kept = [
            line
            for line in read_lines(self.path)
            # What is measured before a step is measured again before going on with it.
            if line["step"] < step + ("interactions/seconds" not in line)
        ]
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        os.replace(unfinished, self.path)
        if tensorboard:
            self._board = _open_board(workdir, step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures of a step."""
        if not self.writes:
            return
        # JSON has no NaN.
        line = {name: v if math.isfinite(v) else None for name, v in figures.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        if self._board is not None:
            self._board.write_scalars(step, dict(figures))

    def write_images(self, step: int, draw: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Adds pictures to TensorBoard; they are drawn in another thread.

        Args:
          step: that they are of.
          draw: makes them, uint8 `[h, w, 3]`.
        """
        board = self._board
        if board is None:
            return

        def work() -> None:
            board.write_images(step, {name: one[None] for name, one in draw().items()})

        self._drawing.append(self._artist.submit(work))

    def write_histograms(
        self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Adds histograms as (counts, edges) to TensorBoard."""
        if self._board is not None:
            self._board.write_counts(step, histograms)

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self.writes:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the log when all pictures are drawn."""
        self._artist.shutdown()
        for drawn in self._drawing:
            drawn.result()
        if self._board is not None:
            self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _open_board(workdir: Path, step: int) -> Any:
    try:
        # clu's writers have the calls that people know, and need TensorFlow.
        from clu import metric_writers

        return _CluBoard(metric_writers.SummaryWriter(str(workdir / "tensorboard")))
    except ImportError:
        return _Board(workdir / "tensorboard", step)


class _Board:
    """Event files without TensorFlow, behind the calls of `clu.metric_writers`."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            self._writer.add_images(name, batch, step, dataformats="NHWC")

    def write_counts(
        self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        for name, (counts, edges) in histograms.items():
            middle = (edges[:-1] + edges[1:]) / 2
            total = float(counts.sum())
            self._writer.add_histogram_raw(
                name, min=float(edges[0]), max=float(edges[-1]), num=total,
                sum=float(counts @ middle), sum_squares=float(counts @ middle**2),
                bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist(), global_step=step,
            )  # fmt: skip

    def close(self) -> None:
        self._writer.close()


class _CluBoard:
    """clu's writer counts values itself: it gets each bin's middle as often as it was counted."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.write_scalars, self.write_images = writer.write_scalars, writer.write_images
        self.close = writer.close

    def write_counts(
        self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        values = {}
        for name, (counts, edges) in histograms.items():
            # 1,000 values tell the shape; a survey counts millions.
            shares = np.rint(counts / max(counts.sum(), 1) * 1000).astype(int)
            values[name] = np.repeat((edges[:-1] + edges[1:]) / 2, shares)
        self._writer.write_histograms(
            step, values, num_buckets={name: len(e) - 1 for name, (_, e) in histograms.items()}
        )
