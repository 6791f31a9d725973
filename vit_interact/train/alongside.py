"""Indicators and responsive fields of the model as it is being trained.

The program is sharded as the training step is, and dispatched behind it: the step that follows
does not wait for it, and what it found is fetched at a later step. It is a program of its own and
not a branch of the step, since a step with it would have to be compiled a second time, backward
pass and all, and would hold its memory at every step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from vit_interact.data.preprocess import Preprocess
from vit_interact.interactions.statistics import Statistics
from vit_interact.models.vit import ViT
from vit_interact.survey.quantities import Design, observe, pool
from vit_interact.train.inputs import EvalFeed
from vit_interact.train.sharding import replicated

# What is logged as one number for each layer; offset kernels are pictures.
_SCALARS = ("window_area", "spread", "entropy", "tendency", "attention_distance")


class Watched(NamedTuple):
    """What one run found.

    Attributes:
      statistics: of every quantity of `Design.quantities`.
      arrows: tendency of the first image's patches by indicator, (row, col), `[L, P, 2]`.
      picture: the first image, uint8 `[h, w, 3]`.
    """

    statistics: dict[str, Statistics]
    arrows: dict[str, Float[Array, "L P 2"]]
    picture: UInt8[Array, "h w 3"]


class Alongside:
    """Watches a fixed batch.

    Attributes:
      design: what is measured.
      seconds: that one run takes by itself; None before the first.
    """

    def __init__(
        self,
        model: ViT,
        preprocess: Preprocess,
        mesh: Mesh,
        batch: Mapping[str, jax.Array],
        indicators: tuple[str, ...],
        coverages: tuple[float, ...],
    ) -> None:
        """Prepares the program; it is compiled at the first call.

        Args:
          model: that is trained.
          preprocess: its normalisation.
          mesh: of the training.
          batch: `pictures` and `mask`, on the devices.
          indicators: names of `interactions.INDICATORS`.
          coverages: of windows.

        Raises:
          ValueError: for an unknown indicator.
        """
        self.design = Design.of(model, indicators=indicators, coverages=coverages)
        self.seconds: float | None = None
        self._batch = batch

        patches = self.design.layout.num_patches

        def watch(params: Any, pictures: Any, mask: Any, sharpness: Any) -> Watched:
            images = preprocess.normalize(pictures)
            found = observe(self.design, model, params, images, sharpness)
            # Patches of the first image come first.
            arrows = {
                name: jnp.stack(
                    [found[f"{name}_tendency_{axis}"][:patches].T for axis in ("row", "col")], -1
                )
                for name in indicators
            }
            return Watched(pool(self.design.empty(), found, mask), arrows, pictures[0])

        self._watch = jax.jit(watch, out_shardings=replicated(mesh))
        self._waiting: tuple[int, Watched] | None = None

    @classmethod
    def of(
        cls, config: Any, model: ViT, preprocess: Preprocess, mesh: Mesh, feed: EvalFeed
    ) -> Alongside:
        """The one that `config.interactions` asks for, on the first images of a split."""
        batch = feed.first(config.images)
        return cls(
            model, preprocess, mesh, batch, tuple(config.indicators), tuple(config.coverages)
        )

    def begin(self, step: int, params: Any, sharpness: float | None = None) -> None:
        """Dispatches; returns before anything is computed, but for the first time.

        Args:
          step: that comes next.
          params: before it.
          sharpness: of predicted windows at that step; None is that of the model's config.
        """
        arguments = params, self._batch["pictures"], self._batch["mask"], sharpness
        if self.seconds is None:
            self.seconds = self._time(*arguments)
        self._waiting = step, self._watch(*arguments)

    def take(self) -> tuple[int, Watched] | None:
        """What was dispatched last, once; waits for it."""
        if self._waiting is None:
            return None
        step, found = self._waiting
        self._waiting = None
        return step, jax.device_get(found)

    def _time(self, *arguments: Any) -> float:
        """Seconds of one run by itself, after compilation."""
        jax.block_until_ready(self._watch(*arguments))
        start = time.perf_counter()
        jax.block_until_ready(self._watch(*arguments))
        return time.perf_counter() - start

    def scalars(self, watched: Watched) -> dict[str, float]:
        """Means by layer: `interactions/attention_spread/layer_00` and so on."""
        figures = {}
        for name, quantity in self.design.quantities().items():
            if not name.endswith(_SCALARS):
                continue
            mean = np.asarray(watched.statistics[name].mean)
            # Over heads, and at the first coverage.
            mean = mean.mean(axis=-1) if "head" in quantity.dims else mean
            mean = mean[0] if "coverage" in quantity.dims else mean
            for layer, value in enumerate(mean):
                figures[f"interactions/{name}/layer_{layer:02d}"] = float(value)
        return figures

    def histograms(self, watched: Watched) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Counts over all layers and their edges, for the same quantities."""
        histograms = {}
        for name, quantity in self.design.quantities().items():
            edges = quantity.edges
            if name.endswith(_SCALARS) and edges is not None:
                counts = np.asarray(watched.statistics[name].histogram)
                counts = counts.reshape(-1, counts.shape[-1]).sum(axis=0)
                # The edges hold all that can be; the first and last bin are for what lies outside.
                histograms[f"interactions/{name}"] = counts[1:-1], edges
        return histograms

    def pictures(self, step: int, watched: Watched) -> dict[str, np.ndarray]:
        """Offset maps by layer, growth of fields with depth, and arrows: uint8 `[h, w, 3]`."""
        from vit_interact.survey.store import to_dataset
        from vit_interact.viz.png import pixels
        from vit_interact.viz.survey import draw_fields, draw_kernel
        from vit_interact.viz.training import draw_tendency

        images = int(np.asarray(self._batch["mask"]).sum())
        about = {"images": images, "data": f"step {step}"}
        dataset = to_dataset(self.design, watched.statistics, about)
        figures = {f"{name}_kernel": draw_kernel(dataset, name) for name in self.design.indicators}
        figures["fields"] = draw_fields(dataset)
        for name, arrows in watched.arrows.items():
            figures[f"{name}_arrows"] = draw_tendency(
                np.asarray(watched.picture), np.asarray(arrows), self.design.layout
            )
        return {f"interactions/{name}": pixels(one, 80) for name, one in figures.items()}
