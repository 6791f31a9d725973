"""Figures of an analysis folder, drawn in other processes where that pays."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vit_interact.data.naming import slug
from vit_interact.processes import collect_seldom, deaf_to_interrupts, end_with_parent
from vit_interact.viz.image_data import PlainImage
from vit_interact.viz.stems import TITLES

if TYPE_CHECKING:
    import xarray as xr

# Rendering in other processes pays only when there is enough of it.
_POOL_FROM = 12
# Each takes up to 200 MB, and so many draw faster than most accelerators measure.
_MOST_WORKERS = 16

Render: TypeAlias = "Callable[[xr.Dataset, Path], list[Future[None]]]"
"""Draws a batch's figures into an output folder; gives what is not drawn yet."""


def _render_one(one: PlainImage, folder: Path, stems: Sequence[str]) -> None:
    from vit_interact.viz.figures import render_image

    render_image(one, folder, stems)


def folder_of(name: str, out: Path) -> Path:
    """Where the figures of an image go."""
    return out / "images" / slug(name)


def _plain(dataset: xr.Dataset, out: Path) -> Iterator[tuple[PlainImage, Path]]:
    """Every image with its folder."""
    for index in range(dataset.sizes["image"]):
        one = PlainImage.of(dataset.isel(image=index))
        yield one, folder_of(str(one["image"].item()), out)


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
    workers = min(_MOST_WORKERS, os.cpu_count() or 1, images * len(stems))
    ready = "matplotlib.figure" in sys.modules or workers == 1
    if not workers or (images < _POOL_FROM and ready):

        def render(dataset: xr.Dataset, out: Path) -> list[Future[None]]:
            for one, folder in _plain(dataset, out) if stems else ():
                _render_one(one, folder, stems)
            return []

        yield render
        return
    others = set(multiprocessing.active_children())
    asked: list[Future[None]] = []
    with _pool(workers) as pool:

        def render_in_pool(dataset: xr.Dataset, out: Path) -> list[Future[None]]:
            # Here, or the parent would import Matplotlib before it has computed anything.
            parts = min(max(1, workers // dataset.sizes["image"]), len(stems))
            drawn = [
                pool.submit(_render_one, one, folder, stems[part::parts])
                for one, folder in _plain(dataset, out)
                for part in range(parts)
            ]
            asked.extend(drawn)
            return drawn

        try:
            yield render_in_pool
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
