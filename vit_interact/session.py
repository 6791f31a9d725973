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
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_interact.data.images import ImageError, read_image
from vit_interact.data.naming import Work, name_files, visible
from vit_interact.drawing import Render, folder_of, renderer
from vit_interact.viz.stems import TITLES, applies

if TYPE_CHECKING:
    import xarray as xr

    from vit_interact.models.weights import Checkpoint

# Of a chunk, which is a file: each costs more to write and to find than a kilobyte in it. What is
# small is written again with each batch until its chunk is full; Zarr replaces files as a whole, so
# that a kill leaves what was in them.
_CHUNK_BYTES = 4 * 2**20
_CHUNK_IMAGES = 16


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
    folder = _Folder(out, _fingerprint(checkpoint, options), overwrite)
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
            _wait(draw.images(dataset, out))
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

    def __init__(self, folder: _Folder, advance: Callable[[int], None]) -> None:
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
        _wait(self._drawn)  # where it fails this batch stays: none counts before it
        works, self._works = self._works, []
        self._folder.commit(works)
        self._advance(len(works))


def _wait(drawn: list[Future[None]]) -> None:
    for figures in drawn:
        figures.result()


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


class _Folder:
    """The state of an output folder on disk."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], overwrite: bool) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.store, self.progress = path / "analysis.zarr", path / "progress.json"
        self.report = path / "report.html"
        self.done: dict[str, str] = {}
        self.written = 0  # images in the store, some of which may not count yet
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; --out needs a folder")
        path.mkdir(parents=True, exist_ok=True)
        if self.progress.exists():
            self._resume(overwrite)
        else:
            # Without our record nothing here is ours: `--out .` beside a folder `images` of
            # photographs must not cost a file, not even with --overwrite.
            theirs = [made for made in self._made() if os.path.lexists(made)]
            if theirs:
                raise ValueError(
                    f"{theirs[0]} exists and was not made by this command; use another --out"
                )
        # From here on the folder says whose it is, even if the first batch is killed.
        self.commit([])

    def _resume(self, overwrite: bool) -> None:
        try:
            record = json.loads(self.progress.read_text("utf-8"))
            known, done = record["options"], dict(record["done"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            # Ours is replaced atomically, so this is somebody else's.
            raise ValueError(
                f"{self.progress} was not made by this command; use another --out"
            ) from error
        if overwrite and known != self.fingerprint:
            self._clear()
            return
        if known != self.fingerprint:
            raise ValueError(
                f"{self.path} holds an analysis with {_difference(known, self.fingerprint)}; "
                "use another --out, or --overwrite to replace it"
            )
        self.done = done
        if not self.store.exists():
            self.done = {}
        self.written = len(self.done)
        self._cut_back(self.written)

    def _made(self) -> list[Path]:
        """What this command writes beside `progress.json`."""
        pages = [*self.path.glob("contact_sheet*.png"), self.path / "index.html", self.report]
        return [self.store, self.path / "images", *pages]

    def _clear(self) -> None:
        """Removes an earlier analysis of this command; only after its record has been read."""
        self.done = {}
        self.commit([])
        for made in self._made():
            if made.is_dir():
                shutil.rmtree(made)
            else:
                made.unlink(missing_ok=True)

    def _cut_back(self, count: int) -> None:
        """Shortens arrays that a killed run had begun to extend."""
        import zarr

        if not self.store.exists():
            return
        if not count:
            shutil.rmtree(self.store)
            return
        (self.store / ".zmetadata").unlink(missing_ok=True)
        for _, array in zarr.open_group(self.store, mode="a", use_consolidated=False).arrays():
            dims: Any = array.attrs.get("_ARRAY_DIMENSIONS") or ()
            if list(dims)[:1] == ["image"]:
                array.resize((count, *array.shape[1:]))

    def append(self, dataset: xr.Dataset) -> None:
        """Adds a batch to the store; it counts only after `commit`."""
        (self.store / ".zmetadata").unlink(missing_ok=True)
        # Format 2: variable-length strings and consolidated metadata are stable in it.
        if not self.written:
            encoding = {
                str(name): {"chunks": _chunks(variable)}
                for name, variable in dataset.data_vars.items()
            }
            encoding["image"] = {"chunks": (1024,)}
            dataset.to_zarr(
                self.store, mode="w", encoding=encoding, consolidated=False, zarr_format=2
            )
        else:
            fixed = [str(n) for n, v in dataset.variables.items() if "image" not in v.dims]
            dataset.drop_vars(fixed).to_zarr(
                self.store, append_dim="image", consolidated=False, zarr_format=2
            )
            self._name_coordinates(dataset)
        self.written += dataset.sizes["image"]

    def undrawn(self, names: Sequence[str], stems: Sequence[str]) -> list[str]:
        """Those of some images in the store that lack one of these figures."""
        if not names or not stems:
            return []
        wanted = [f"{stem}.png" for stem in stems if applies(stem, self.read(names[:1]))]
        return [
            name
            for name in names
            if not all((folder_of(name, self.path) / file).exists() for file in wanted)
        ]

    def read(self, names: Sequence[str]) -> xr.Dataset:
        """Images of the store, in memory."""
        import xarray as xr

        return xr.open_zarr(self.store, consolidated=False).sel(image=list(names)).load()

    def _name_coordinates(self, dataset: xr.Dataset) -> None:
        """Names the coordinates of a store again: appending forgets those without images."""
        import zarr

        names = [str(n) for n in dataset.coords if n not in dataset.dims]
        if names:
            group = zarr.open_group(self.store, mode="r+", use_consolidated=False)
            group.attrs["coordinates"] = " ".join(names)

    def commit(self, works: Sequence[Work]) -> None:
        """Records that arrays and figures of these images are complete."""
        self.done.update({work.name: work.sha256 for work in works})
        unfinished = self.progress.with_suffix(".unfinished")
        record = {"options": self.fingerprint, "done": list(self.done.items())}
        unfinished.write_text(json.dumps(record, indent=1), "utf-8")
        os.replace(unfinished, self.progress)

    def finish(
        self, draw: Render, failures: list[tuple[str, str]], fresh: bool
    ) -> xr.Dataset | None:
        """Draws the sheets and the pages over everything in the folder."""
        import xarray as xr
        import zarr

        from vit_interact.viz.pack import Pack, fitting
        from vit_interact.viz.page import report_page
        from vit_interact.viz.report import index_page

        if not self.done:
            return None
        zarr.consolidate_metadata(self.store, zarr_format=2)
        dataset = xr.open_zarr(self.store)
        drawn = draw.sheets(dataset, self.path / "contact_sheet.png")
        if fresh or not self.report.exists():
            report_page(Pack(dataset.isel(image=slice(0, fitting(dataset)))), self.report)
        _wait(drawn)
        index_page(dataset, self.path, failures, self.path / "index.html")
        return dataset


def _chunks(variable: xr.DataArray) -> tuple[int, ...]:
    """Sizes of a variable's chunks, the image being its first dimension."""
    chunks, room = [], _CHUNK_BYTES // variable.dtype.itemsize
    for size in (*variable.shape[:0:-1], _CHUNK_IMAGES):
        chunks.append(max(1, min(size, room)))
        room //= chunks[-1]
    return tuple(reversed(chunks))


def _difference(old: Any, new: dict[str, Any]) -> str:
    """The settings that differ, as `name=old (not new)`."""
    if not isinstance(old, dict):
        return "unreadable settings"
    told = []
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            told.append(_difference(old[key], new[key]))
        elif key.endswith("sha256"):
            told.append("other weights")
        else:
            told.append(f"{key}={old.get(key)} (not {new.get(key)})")
    return ", ".join(told)
