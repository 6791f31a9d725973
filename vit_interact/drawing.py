"""Figures of an analysis folder, drawn in other processes where that pays."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vit_interact.data.naming import slug
from vit_interact.processes import collect_seldom, deaf_to_interrupts, end_with_parent
from vit_interact.viz.image_data import ImageData, PlainImage

if TYPE_CHECKING:
    import xarray as xr

# Rendering in other processes pays only when there is enough of it.
_POOL_FROM = 12

Render: TypeAlias = "Callable[[xr.Dataset, Path], list[Future[None]]]"
"""Draws a batch's figures into an output folder; gives what is not drawn yet."""


def _render_one(one: ImageData, folder: Path, part: int = 0, parts: int = 1) -> None:
    from vit_interact.viz.figures import FIGURES, render_image

    render_image(one, folder, list(FIGURES)[part::parts])


def _folder_of(one: xr.Dataset, out: Path) -> Path:
    return out / "images" / slug(str(one["image"].values))


def _start_worker() -> None:
    end_with_parent()
    collect_seldom()
    # Python would take a second to take Matplotlib down again.
    atexit.register(os._exit, 0)
    import vit_interact.viz.figures  # noqa: F401


@contextlib.contextmanager
def renderer(images: int) -> Iterator[Render]:
    """Draws figures, in other processes where that pays; what they draw meanwhile are futures.

    It pays when there are many, and when Matplotlib is not imported yet: that takes as long as
    measuring an image, and other processes do it meanwhile.

    Args:
      images: at most, over all batches.
    """
    workers = min(4, os.cpu_count() or 1)
    ready = "matplotlib.figure" in sys.modules or workers == 1
    if not images or (images < _POOL_FROM and ready):

        def render(dataset: xr.Dataset, out: Path) -> list[Future[None]]:
            for index in range(dataset.sizes["image"]):
                one = dataset.isel(image=index)
                _render_one(one, _folder_of(one, out))
            return []

        yield render
        return
    others = set(multiprocessing.active_children())
    # spawn: forking a process that runs XLA's threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:
        with deaf_to_interrupts():
            for _ in range(workers):
                pool.submit(os.getpid)  # a worker starts when there is something to do
        asked: list[Future[None]] = []

        def render_in_pool(dataset: xr.Dataset, out: Path) -> list[Future[None]]:
            # Here, or the parent would import Matplotlib before it has computed anything.
            count = dataset.sizes["image"]
            parts = max(1, workers // count)
            each = (dataset.isel(image=index) for index in range(count))
            drawn = [
                pool.submit(_render_one, PlainImage.of(one), _folder_of(one, out), part, parts)
                for one in each
                for part in range(parts)
            ]
            asked.extend(drawn)
            return drawn

        try:
            yield render_in_pool
        finally:
            if not asked:
                # Nobody waits for imports that nobody needs.
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
