"""Figures of an analysis folder, drawn in other processes where that pays."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_interact.data.naming import slug
from vit_interact.processes import collect_seldom, deaf_to_interrupts, end_with_parent
from vit_interact.viz.image_data import PlainImage
from vit_interact.viz.stems import TITLES, sheets

if TYPE_CHECKING:
    import xarray as xr

# Rendering in other processes pays only when there is enough of it.
_POOL_FROM = 12
# Each takes up to 200 MB, and so many draw faster than most accelerators measure.
_MOST_WORKERS = 16


def _render_one(one: PlainImage, folder: Path, stems: Sequence[str]) -> None:
    from vit_interact.viz.figures import render_image

    render_image(one, folder, stems)


def _render_sheet(images: Sequence[PlainImage], path: Path, start: int, count: int) -> None:
    from vit_interact.viz.contact import contact_sheet

    contact_sheet(images, path, start, count)


def folder_of(name: str, out: Path) -> Path:
    """Where the figures of an image go."""
    return out / "images" / slug(name)


def wait(drawn: list[Future[None]]) -> None:
    """Until all is drawn; raises what drawing raised."""
    for figures in drawn:
        figures.result()


@dataclasses.dataclass(frozen=True)
class Render:
    """Has something drawn; what is not drawn yet is a future.

    Attributes:
      stems: which figures of each image.
      submit: takes a function and its arguments.
      workers: how many draw.
    """

    stems: Sequence[str]
    submit: Callable[..., Future[None]]
    workers: int = 1

    def images(self, dataset: xr.Dataset, out: Path) -> list[Future[None]]:
        """Figures of a batch, into an output folder."""
        if not self.stems:
            return []
        parts = min(max(1, self.workers // dataset.sizes["image"]), len(self.stems))
        # By far the most of the data, which would be sent to other processes.
        unseen = [
            name
            for name, variable in dataset.data_vars.items()
            if "key" in variable.dims and {"layer", "other"} & set(variable.dims)
        ]
        return [
            self.submit(_render_one, one, folder_of(str(one["image"].item()), out), stems)
            for one in _plain(dataset.drop_vars(unseen))
            for stems in (self.stems[part::parts] for part in range(parts))
        ]

    def sheets(self, dataset: xr.Dataset, first: Path) -> list[Future[None]]:
        """Contact sheets of everything in the folder."""
        # Sheets show no layers by themselves, and no rows of patches: by far the most of the data.
        large = [name for name, variable in dataset.data_vars.items()
                 if {"layer", "key"} & set(variable.dims)]  # fmt: skip
        small, count = dataset.drop_vars(large), dataset.sizes["image"]
        return [
            self.submit(
                _render_sheet,
                list(_plain(small.isel(image=slice(shown.start, shown.stop)).load())),
                path, shown.start, count,
            )
            for path, shown in sheets(first, count)
        ]  # fmt: skip


def _plain(dataset: xr.Dataset) -> Iterator[PlainImage]:
    # Here, or workers would import xarray, and this process Matplotlib before it has computed.
    return (PlainImage.of(dataset.isel(image=k)) for k in range(dataset.sizes["image"]))


def _at_once(function: Callable[..., None], *arguments: Any) -> Future[None]:
    function(*arguments)
    drawn: Future[None] = Future()
    drawn.set_result(None)
    return drawn


def _start_worker() -> None:
    end_with_parent()
    collect_seldom()
    # Python would take a second to take Matplotlib down again.
    atexit.register(os._exit, 0)
    import vit_interact.viz.ready  # noqa: F401


@contextlib.contextmanager
def renderer(images: int, stems: Sequence[str] = tuple(TITLES)) -> Iterator[Render]:
    """Draws figures, in other processes where that pays; what they draw meanwhile are futures.

    It pays when there are many, and when Matplotlib is not imported yet: that takes as long as
    measuring an image, and other processes do it meanwhile.

    Args:
      images: at most, over all batches.
      stems: which figures, keys of `stems.TITLES`.
    """
    # Without figures there are sheets.
    workers = min(_MOST_WORKERS, os.cpu_count() or 1, images * len(stems) or 1)
    ready = "matplotlib.figure" in sys.modules or workers == 1
    if images < _POOL_FROM and ready:
        yield Render(stems, _at_once)
        return
    others = set(multiprocessing.active_children())
    asked: list[Future[None]] = []
    with _pool(workers) as pool:

        def submit(function: Callable[..., None], *arguments: Any) -> Future[None]:
            asked.append(pool.submit(function, *arguments))
            return asked[-1]

        try:
            yield Render(stems, submit, workers)
        except BaseException:
            # It will not count, so what waits need not begin.
            for figures in asked:
                figures.cancel()
            raise
        finally:
            if not asked:
                # Nobody waits for imports that nobody needs.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that draw; Matplotlib comes in from now on."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        # One process imports it for all and forks them when there is something to draw. This one
        # runs XLA's threads: forking it can hang.
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "vit_interact.viz.ready"])
        with deaf_to_interrupts():
            forkserver.ensure_running()
        return concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker)
    # System libraries of macOS do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker)
    with deaf_to_interrupts():
        for _ in range(workers):
            pool.submit(os.getpid)  # a worker starts when there is something to do
    return pool
