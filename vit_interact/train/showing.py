"""Pictures of the windows that a model in training predicts, on a few images that stay the same."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from vit_interact.interactions.boxes import clipped_boxes
from vit_interact.models.winft import predicted_distances, window_layers
from vit_interact.train.inputs import EvalFeed
from vit_interact.train.sharding import replicated
from vit_interact.train.step import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Seen(NamedTuple):
    """Windows of the images.

    Attributes:
      pictures: uint8 `[n, h, w, 3]`.
      boxes: predicted (top, left, bottom, right) in patches, `[L, n, G, P, 4]`.
      goals: the guide's windows `[L, n, P, 4]`, or None.
    """

    pictures: UInt8[np.ndarray, "n h w 3"]
    boxes: Float[np.ndarray, "L n G P 4"]
    goals: Int[np.ndarray, "L n P 4"] | None


class Showing:
    """Looks at the first images of a split, always the same.

    Attributes:
      seen: what was found last, and at which step; None before the first time.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, feed: EvalFeed, count: int = 4) -> None:
        """Prepares the program; it is compiled when it is first asked for.

        Args:
          recipe: of the training; its model predicts windows.
          mesh: of the training.
          feed: of the split.
          count: of images.
        """
        self._batch = feed.first(count)
        self._recipe = recipe
        self.seen: tuple[int, Seen] | None = None
        model, guide, preprocess = recipe.model, recipe.guide, recipe.preprocess

        # Processes see only their own part of the batch, but all of what is replicated.
        def look(params: Any, batch: Any, sharpness: Any, teaching: Any) -> tuple[Any, ...]:
            pictures, mask = batch["pictures"], batch["mask"]
            images = preprocess.normalize(pictures)
            _, distances = predicted_distances(model, params, images, sharpness=sharpness)
            boxes = clipped_boxes(distances, model.config.layout)
            goals = None
            if guide is not None:
                goals, _ = guide.windows(model, params, teaching, images, preprocess)
            return pictures, mask, boxes, goals

        self._look = jax.jit(look, out_shardings=replicated(mesh))

    def look(self, step: int, params: Any, sharpness: float | None, teaching: Any) -> None:
        """Finds the windows of these parameters."""
        found = jax.device_get(self._look(params, self._batch, sharpness, teaching))
        pictures, mask, boxes, goals = found
        goals = None if goals is None else goals[:, mask]
        self.seen = step, Seen(pictures[mask], boxes[:, mask], goals)

    def draw(self, step: int, seen: Seen) -> Figure:
        """The picture."""
        from vit_interact.viz.predicted import draw_predicted_windows

        model = self._recipe.model
        title = f"Predicted windows at step {step}"
        return draw_predicted_windows(
            seen.pictures, seen.boxes, seen.goals, window_layers(model), model.config.layout, title
        )

    def images(self) -> functools.partial[dict[str, np.ndarray]]:
        """What draws the picture for TensorBoard, uint8 `[h, w, 3]`."""
        # Here, on the caller's thread: several threads that import it at once have failed.
        import vit_interact.viz.predicted  # noqa: F401

        assert self.seen is not None
        return functools.partial(self._pixels, *self.seen)

    def _pixels(self, step: int, seen: Seen) -> dict[str, np.ndarray]:
        from vit_interact.viz.png import pixels

        return {"windows": pixels(self.draw(step, seen), 80)}
