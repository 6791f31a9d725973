"""Windows of a run: which the model gets, and what teaches those that it predicts.

`config.winft.windows` names them. Those of a window-free transformer are `predicted`; the others
are what it is compared with: `local` boxes, `shifted` tiles, `random` boxes, boxes by mean
interaction at each `offset` (from a file of `vit-interact statistics`), and boxes that a frozen
`teacher` would draw for each image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.data.preprocess import Preprocess
from vit_interact.interactions.boxes import box_area, clipped_boxes, iou, window_guidance
from vit_interact.interactions.controls import local_windows, random_windows, shifted_windows
from vit_interact.interactions.indicators import check_name
from vit_interact.interactions.views import patch_view
from vit_interact.interactions.window_masks import window_mask
from vit_interact.interactions.windows import smallest_windows
from vit_interact.layout import TokenLayout
from vit_interact.models.config import WindowConfig
from vit_interact.models.vit import ViT
from vit_interact.models.weights import load_checkpoint
from vit_interact.models.winft import give_windows, to_winft, window_layers, without_windows
from vit_interact.observe.measure import measure

GIVEN = ("local", "shifted", "random", "offset")


@dataclasses.dataclass(frozen=True)
class Guide:
    """Where windows come from that are not predicted.

    Attributes:
      layers: that have windows.
      indicator: of `interactions.INDICATORS`.
      coverage: of windows.
      every: one of so many images of a batch is measured.
      model: that is measured: a frozen teacher; None for the model in training, with its windows
        taken off. Within its own windows an indicator would find smaller ones every time, until
        nothing but the patch itself is left.
      preprocess: the teacher's normalisation.
      fixed: windows of all images instead, `[L, P, 4]`.
    """

    layers: tuple[int, ...]
    indicator: str = "leave_one_out"
    coverage: float = 0.9
    every: int = 1
    model: ViT | None = None
    preprocess: Preprocess | None = None
    fixed: np.ndarray | None = None

    def chosen(self, array: Array) -> Array:
        """The images that are measured; devices keep their own."""
        return array.reshape(-1, self.every, *array.shape[1:])[:, 0]

    def windows(
        self,
        model: ViT,
        params: Any,
        teaching: Any,
        images: Float[Array, "B h w 3"],
        preprocess: Preprocess,
    ) -> tuple[Int[Array, "L B P 4"], Bool[Array, "L B P"]]:
        """Windows of images, and whether a patch's row of the indicator holds anything.

        Args:
          model: in training.
          params: its parameters.
          teaching: parameters of the teacher, or None.
          images: normalised.
          preprocess: that normalised them.
        """
        layout = model.config.layout
        if self.fixed is not None:
            shape = (len(self.layers), images.shape[0], layout.num_patches)
            windows = jnp.broadcast_to(jnp.asarray(self.fixed)[:, None], (*shape, 4))
            return windows, jnp.ones(shape, bool)
        if self.model is None:
            measured, weights = without_windows(model, params)
        else:
            assert self.preprocess is not None
            measured, weights = self.model, teaching
            images = renormalized(images, preprocess, self.preprocess)
        maps = measure(measured, weights, images, (self.indicator,), layers=self.layers)
        view = jax.lax.stop_gradient(patch_view(maps[self.indicator], layout))
        return smallest_windows(view, layout, self.coverage), jnp.sum(view, axis=-1) > 0

    def masks(self, model: ViT, windows: Int[Array, "L B P 4"]) -> list[Any]:
        """Masks for `model.apply`, one for each layer or None."""
        by_layer = dict(zip(self.layers, windows, strict=True))
        layout, depth = model.config.layout, model.config.depth
        return [window_mask(by_layer[i], layout) if i in by_layer else None for i in range(depth)]


def renormalized(
    images: Float[Array, "B h w 3"], ours: Preprocess, theirs: Preprocess
) -> Float[Array, "B h w 3"]:
    """Images normalised for one model as another wants them."""
    pixels = images * jnp.asarray(ours.std) + jnp.asarray(ours.mean)
    return (pixels - jnp.asarray(theirs.mean)) / jnp.asarray(theirs.std)


def guidance(
    distances: Float[Array, "L B G P 4"],
    windows: Int[Array, "L B P 4"],
    counts: Bool[Array, "L B P"],
    layout: TokenLayout,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Loss of each image, and mean IoU of its boxes with the windows.

    Args:
      distances: predicted.
      windows: to learn from.
      counts: patches that have one to learn from.
      layout: the grid.
    """
    windows, counts = windows[:, :, None], counts[:, :, None]
    losses = window_guidance(
        distances, windows, layout, jnp.broadcast_to(counts, distances.shape[:-1])
    )
    shared = iou(clipped_boxes(distances, layout), windows.astype(distances.dtype))
    number = jnp.maximum(jnp.sum(counts, axis=-1), 1)
    shared = jnp.sum(jnp.where(counts, shared, 0), axis=-1) / number
    return jnp.mean(losses, axis=(0, 2)), jnp.mean(shared, axis=(0, 2))


def window_shares(distances: Float[Array, "L B G P 4"], layout: TokenLayout) -> Float[Array, "B L"]:
    """Mean area of an image's predicted boxes on the grid by layer, as a share of it."""
    area = box_area(clipped_boxes(distances, layout)) / layout.num_patches
    return jnp.mean(area, axis=(2, 3)).T


class Windowing(NamedTuple):
    """What `config.winft` asks for.

    Attributes:
      model: with windows.
      params: its parameters, or None to draw them.
      prepare: puts given windows into parameters.
      guide: teaches predicted windows, or None.
      attend: says for each image which windows are attended within, or None.
      teaching: parameters of the teacher, or None.
      weight: of the guidance loss by step.
      sharpness: `τ` by step, or None for that of the model.
      hard: whether patches attend within whole patches of their windows when the model is judged.
    """

    model: ViT
    params: Any
    prepare: Callable[[Any], Any] = lambda params: params
    guide: Guide | None = None
    attend: Guide | None = None
    teaching: Any = None
    weight: Callable[[Any], Any] = lambda step: 0.0
    sharpness: Callable[[Any], Any] | None = None
    hard: bool = False

    @property
    def judged(self) -> ViT:
        """The model that is evaluated."""
        return self._with(hard=True) if self.hard else self.model

    def sharpness_at(self, step: int) -> float | None:
        """`τ` after so many steps, or None for that of the model."""
        return None if self.sharpness is None else float(self.sharpness(step))

    def model_at(self, step: int) -> ViT:
        """The model whose windows are as sharp as they are after so many steps."""
        tau = self.sharpness_at(step)
        return self.model if tau is None else self._with(sharpness=tau)

    def _with(self, **changes: Any) -> ViT:
        """The model with other settings of its windows."""
        config = self.model.config
        if config.windows is None:
            return self.model
        windows = dataclasses.replace(config.windows, **changes)
        return self.model.clone(config=dataclasses.replace(config, windows=windows))


def plan_windows(config: Any, model: ViT, params: Any, steps: int) -> Windowing:
    """The model with the windows of `config.winft`, and what teaches them.

    Args:
      config: the whole config.
      model: that the run starts from.
      params: its parameters, or None.
      steps: of the whole run.

    Raises:
      ValueError: for windows, teachers or files that do not fit the model.
    """
    winft = config.winft
    kind = winft.windows
    if not kind:
        return Windowing(model, params)
    depth = model.config.depth
    layers = tuple(int(layer) for layer in winft.layers)
    if wrong := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(f"config.winft.layers has {wrong}; the model has {depth} layers")
    layers = tuple(sorted(set(layers))) or tuple(range(depth))
    guide = Guide(layers, winft.indicator, winft.coverage, winft.every)
    if kind == "teacher":
        attend, teaching = _teacher(config, model, dataclasses.replace(guide, every=1))
        return Windowing(model, params, attend=attend, teaching=teaching)
    own = None if len(layers) == depth else layers
    if kind in GIVEN:
        model, params = _windowed(model, params, WindowConfig(layers=own, kind="given"))
        windows = _given(config, model, layers)
        return Windowing(model, params, lambda params: give_windows(model, params, windows))
    first, last = winft.sharpness
    wanted = WindowConfig(
        layers=own,
        groups=winft.groups,
        sharpness=first,
        reach=winft.reach,
        start=winft.start,
        detach=winft.detach,
    )
    model, params = _windowed(model, params, wanted)
    teaching, taught = None, winft.guide
    if taught == "teacher":
        guide, teaching = _teacher(config, model, guide)
    elif taught == "file":
        guide = dataclasses.replace(guide, every=1, fixed=_of_file(config, model, layers))
    strong, weak = winft.weight
    return Windowing(
        model,
        params,
        guide=guide if taught else None,
        teaching=teaching,
        weight=lambda step: strong + (weak - strong) * step / steps,
        sharpness=lambda step: first * (last / first) ** (step / steps),
        hard=winft.hard,
    )


def _windowed(model: ViT, params: Any, wanted: WindowConfig) -> tuple[ViT, Any]:
    """The model with windows; one that has them goes on with its own."""
    had = model.config.windows
    if had is not None:
        if dataclasses.replace(wanted, sharpness=had.sharpness, hard=had.hard) != had:
            raise ValueError(
                f"config.init has windows of its own: {had}; config.winft asks for {wanted}"
            )
        return model, params
    if params is None:
        config = dataclasses.replace(model.config, windows=wanted)
        return model.clone(config=config), None
    return to_winft(model, params, wanted)


def _given(config: Any, model: ViT, layers: tuple[int, ...]) -> np.ndarray:
    """Windows that are the same for all images, `[L, P, 4]`."""
    winft, layout = config.winft, model.config.layout
    if winft.windows == "offset":
        return _of_file(config, model, layers)
    size = (int(winft.size[0]), int(winft.size[1]))
    local = local_windows(size, layout)
    if winft.windows == "local":
        return np.asarray(jnp.stack([local] * len(layers)))
    if winft.windows == "random":
        keys = jax.random.split(jax.random.key(config.seed), len(layers))
        return np.asarray(jnp.stack([random_windows(local, layout, key) for key in keys]))
    half = (size[0] // 2, size[1] // 2)
    both = [shifted_windows(size, layout), shifted_windows(size, layout, half)]
    return np.asarray(jnp.stack([both[layer % 2] for layer in layers]))


def _of_file(config: Any, model: ViT, layers: tuple[int, ...]) -> np.ndarray:
    """Windows by the mean impact at each offset, of a file of `vit-interact statistics`."""
    from vit_interact.survey.offsets import offset_windows

    winft = config.winft
    if not winft.file:
        raise ValueError("config.winft.file is empty: a store that vit-interact statistics wrote")
    windows = offset_windows(winft.file, model.config.layout, winft.indicator, winft.coverage)
    if len(windows) != model.config.depth:
        raise ValueError(
            f"config.winft.file={winft.file} is of a model with {len(windows)} layers; this one "
            f"has {model.config.depth}"
        )
    return windows[list(layers)]


def _teacher(config: Any, model: ViT, guide: Guide) -> tuple[Guide, Any]:
    """The guide with the teacher that is measured, and its parameters."""
    name = config.winft.teacher
    if not name:
        raise ValueError("config.winft.teacher is empty: anything that vi.load_model reads")
    try:
        found = load_checkpoint(name, image_size=model.config.image_size, dtype=model.config.dtype)
    except ValueError as error:
        raise ValueError(f"config.winft.teacher={name}: {error}") from error
    theirs, ours = found.model.config, model.config
    same = (theirs.depth, theirs.layout.rows, theirs.layout.cols)
    if same != (ours.depth, ours.layout.rows, ours.layout.cols):
        raise ValueError(
            f"config.winft.teacher={name} has {same[0]} layers and a grid of {same[1]}x{same[2]}; "
            f"expected {ours.depth} and {ours.layout.rows}x{ours.layout.cols}"
        )
    return dataclasses.replace(guide, model=found.model, preprocess=found.preprocess), found.params


def frozen_windows(model: ViT, frozen: Any) -> tuple[str, ...]:
    """A line for people when frozen blocks hold what predicts windows, which then never move.

    Args:
      model: of the run.
      frozen: tree of which parameters stay.
    """
    if model.config.scan:
        return ()
    blocks = frozen["Transformer"]
    still = [
        layer
        for layer in window_layers(model)
        if all(jax.tree.leaves(blocks[f"encoderblock_{layer}"]["WindowHead_0"]))
    ]
    if not still:
        return ()
    return (
        f"warning: config.optimizer.freeze also freezes the windows of layers "
        f"{', '.join(map(str, still))}; config.winft.layers chooses others",
    )


def check_windows(winft: Any, batch: int) -> None:
    """Refuses settings of `config.winft` that cannot be.

    Args:
      winft: `config.winft`.
      batch: images of a part of a batch.

    Raises:
      ValueError: in one line.
    """
    check_name(winft.indicator)
    if not 0 < winft.coverage <= 1:
        raise ValueError(f"config.winft.coverage={winft.coverage}: expected a share in (0, 1]")
    for name in ("sharpness", "weight", "size"):
        if len(winft[name]) != 2:
            raise ValueError(f"config.winft.{name}={tuple(winft[name])}: expected two numbers")
    if min(winft.sharpness) <= 0:
        raise ValueError(f"config.winft.sharpness={tuple(winft.sharpness)}: expected more than 0")
    if min(winft.weight) < 0:
        raise ValueError(f"config.winft.weight={tuple(winft.weight)}: expected at least 0")
    if winft.windows == "predicted" and winft.guide and (winft.every < 1 or batch % winft.every):
        raise ValueError(
            f"config.winft.every={winft.every} does not divide the {batch} images of a batch, or "
            "of a part with config.optimizer.accumulate"
        )
