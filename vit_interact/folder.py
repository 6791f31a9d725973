"""An output folder of `session.analyze_folder` on disk: what is in it, and what of that counts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_interact.data.naming import Work
from vit_interact.drawing import Render, folder_of, wait
from vit_interact.viz.stems import applies

if TYPE_CHECKING:
    import xarray as xr

# Of a chunk, which is a file: each costs more to write and to find than a kilobyte in it. What is
# small is written again with each batch until its chunk is full; Zarr replaces files as a whole, so
# that a kill leaves what was in them.
_CHUNK_BYTES = 4 * 2**20
_CHUNK_IMAGES = 16


class Folder:
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
        wait(drawn)
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
