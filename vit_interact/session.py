"""An analysis folder: images go in batch by batch, and what is done stays done.

Layout of the folder: `analysis.zarr` (the dataset of `vi.analyze`, images appended),
`images/SLUG/*.png`, `contact_sheet.png`, `index.html`, the interactive `report.html`, and
`progress.json`, which says which images are complete. `progress.json` is replaced atomically after
a batch's arrays and figures are written; arrays that reach beyond it, after a kill, are cut back
before the next batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_interact.data.images import ImageError, read_image
from vit_interact.data.naming import Work, name_files, visible
from vit_interact.drawing import Render, renderer, wait
from vit_interact.folder import Folder
from vit_interact.viz.stems import TITLES

if TYPE_CHECKING:
    import xarray as xr

    from vit_interact.models.weights import Checkpoint


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compute; results of other options do not mix in one folder.

    Attributes:
      indicator: one of `interactions.INDICATORS`, of windows, fields and figures.
      coverage: share of impact that a window holds.
      layers: layer numbers, None for all.
      score: "predicted" or a class number.
      others: further indicators, whose interactions are kept too.
    """

    indicator: str = "leave_one_out"
    coverage: float = 0.9
    layers: tuple[int, ...] | None = None
    score: str | int = "predicted"
    others: tuple[str, ...] = ()

    def for_analyze(self) -> dict[str, Any]:
        """Arguments of `vi.analyze`."""
        return {
            "indicator": (self.indicator, *self.others),
            "coverage": self.coverage,
            "layers": self.layers,
            "score": self.score,
        }


class Outcome(NamedTuple):
    """What a run did.

    Attributes:
      dataset: everything in the folder, opened lazily; None when nothing is there.
      done: images analysed by this run.
      skipped: images that an earlier run had done.
      failures: (image, reason) of what could not be read.
    """

    dataset: xr.Dataset | None
    done: int
    skipped: int
    failures: list[tuple[str, str]]


def analyze_folder(
    checkpoint: Checkpoint,
    files: Sequence[Path],
    out: Path,
    options: Options,
    batch_size: int = 8,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
    render: Render | None = None,
    figures: Sequence[str] = tuple(TITLES),
) -> Outcome:
    """Analyses files into `out`, skipping what an earlier run with the same options did.

    A batch is drawn while the next one is measured.

    Args:
      checkpoint: from `load_checkpoint`.
      files: images, from `find_images`.
      out: the folder, made if needed.
      options: what to compute.
      batch_size: images at a time; one program is compiled, the last batch is padded.
      overwrite: forget what the folder holds from runs with other options.
      advance: called with a number of images whenever they are finished, skipped or refused.
      render: of a `renderer` that was begun before; None for one of its own.
      figures: which to draw, keys of `stems.TITLES`; those that an earlier run left out are drawn
        from its arrays.

    Raises:
      ValueError: when the folder holds an analysis with other options or weights.
    """
    from vit_interact.observe.files import analyze_pictures

    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    folder = Folder(out, _fingerprint(checkpoint, options), overwrite)
    failures: list[tuple[str, str]] = []
    todo: list[Work] = []
    again: list[str] = []  # as the folder calls them
    # The name's folders depend on the other files of the command, so they do not count here.
    before = {(Path(name).name, digest): name for name, digest in folder.done.items()}
    for work in name_files(files, folder.done, failures):
        known = before.get((work.path.name, work.sha256))
        if known is None:
            todo.append(work)
        else:
            again.append(known)
    late = folder.undrawn(again, figures)
    advance(len(again) - len(late) + len(failures))
    done = 0
    with contextlib.nullcontext(render) if render else renderer(len(files), figures) as draw:
        for start in range(0, len(late), batch_size):
            dataset = folder.read(late[start : start + batch_size])
            wait(draw.images(dataset, out))
            advance(dataset.sizes["image"])
        # A few images don't pay for the padding of a large batch.
        batch_size = min(batch_size, max(1, len(todo)))
        checkpoint = checkpoint.for_few(len(todo)) if todo else checkpoint
        with _Behind(folder, advance) as behind:
            for start in range(0, len(todo), batch_size):
                chunk = todo[start : start + batch_size]
                good, pictures = _decode(chunk, checkpoint, failures)
                advance(len(chunk) - len(good))
                if good:
                    names = [work.name for work in good]
                    dataset = analyze_pictures(
                        checkpoint, pictures, names, batch_size, **options.for_analyze()
                    )
                    drawn = draw.images(dataset, out)
                    folder.append(dataset)
                    behind.add(good, drawn)
                    done += len(good)
        whole = folder.finish(draw, failures, fresh=done > 0)
    return Outcome(whole, done, len(again), failures)


class _Behind:
    """The batch whose arrays are written and whose figures are being drawn.

    One while the next is measured: more would only take memory. At the end, and where the run
    fails, its figures are waited for; after Ctrl-C it is given up if they are not complete by then.
    """

    def __init__(self, folder: Folder, advance: Callable[[int], None]) -> None:
        self._folder, self._advance = folder, advance
        self._works: list[Work] = []
        self._drawn: list[Future[None]] = []

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception) or _complete(self._drawn):
            self._commit()

    def add(self, works: list[Work], drawn: list[Future[None]]) -> None:
        """Takes a batch in, once the one before counts."""
        self._commit()
        self._works, self._drawn = works, drawn
        if _complete(drawn):
            self._commit()

    def _commit(self) -> None:
        if not self._works:
            return
        wait(self._drawn)  # where it fails this batch stays: none counts before it
        works, self._works = self._works, []
        self._folder.commit(works)
        self._advance(len(works))


def _complete(drawn: list[Future[None]]) -> bool:
    return all(figures.done() for figures in drawn)


def _fingerprint(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    chosen = json.loads(json.dumps(dataclasses.asdict(options)))
    if not options.others:
        del chosen["others"]  # as folders have it that were made before there were others
    return {
        **chosen,
        "model": json.loads(json.dumps(checkpoint.model.config.to_dict())),
        "preprocess": json.loads(json.dumps(checkpoint.preprocess.to_dict())),
        "weights_sha256": checkpoint.sha256,
    }


def _decode(
    chunk: Sequence[Work], checkpoint: Checkpoint, failures: list[tuple[str, str]]
) -> tuple[list[Work], np.ndarray]:
    good, pictures = [], []
    for work in chunk:
        try:
            pictures.append(checkpoint.preprocess.picture(read_image(work.path)))
            good.append(work)
        except ImageError as error:
            failures.append((visible(str(work.path)), error.reason))
    return good, np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
