"""Pictures of a training run: its curves, and what it confuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_interact.layout import TokenLayout
from vit_interact.viz.fields import draw_arrows, full_length
from vit_interact.viz.sheet import GAP, MARGIN, Canvas
from vit_interact.viz.style import COLORMAPS, INK, MUTED, percent, shorten, styled
from vit_interact.viz.wheel import draw_wheel

# Pixels.
_TOP = 92
_WHEEL = 96

_TRAIN, _VAL = INK, "#D55E00"


class Arm(NamedTuple):
    """How one arm of a comparison is named and drawn in every figure.

    Attributes:
      label: in words.
      color: from Okabe and Ito (2008); alike for arms of one kind.
      dashes: tell arms of one kind apart.
    """

    label: str
    color: str
    dashes: Any = "-"


_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 1.5))

#: Arms of `tools/compare_windows.py`.
ARMS = {
    "vit": Arm("ViT", INK),
    "local": Arm("local windows", "#56B4E9"),
    "shifted": Arm("shifted windows", "#56B4E9", _DASHED),
    "random": Arm("random windows", "#56B4E9", _DOTTED),
    "offset": Arm("windows of a survey", "#009E73"),
    "teacher": Arm("windows of a teacher", "#009E73", _DASHED),
    "free": Arm("WinfT, not guided", "#D55E00", _DOTTED),
    "winft": Arm("WinfT", "#D55E00"),
    "taught": Arm("WinfT, guided by a teacher", "#D55E00", _DASHED),
}
_OTHERS = ("#E69F00", "#CC79A7", "#0072B2")


@styled
def draw_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy and learning rate against the step.

    Args:
      lines: of `metrics.jsonl`, each with `step` and figures such as `train/loss`.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name, unit in (
        (loss, "loss", "loss (nats)"),
        (accuracy, "accuracy", "top-1 (share of images)"),
    ):
        _line(axes, lines, f"train/{name}", "training, as augmented", _TRAIN)
        _line(axes, lines, f"val/{name}", "validation", _VAL, marker="o", markersize=4)
        axes.set(xlabel="step", ylabel=unit)
    handles, labels = loss.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
    accuracy.set_ylim(0, 1)
    _line(rate, lines, "train/rate", "", _TRAIN)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.grid(visible=True, alpha=0.3)
    return figure


def _line(
    axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str, color: str, **how: Any
) -> None:
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if found:
        axes.plot(*zip(*found, strict=True), label=label, color=color, **how)


@styled
def draw_confusion(figures: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """The share of each class (row) that got each prediction (column).

    Args:
      figures: of `Evaluation.compute`.
      names: of the classes.
    """
    confusion = np.asarray(figures["confusion"])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    count = len(names)
    # Names that would overlap or be too small to read: an even choice is shown.
    ticks = np.arange(0, count, -(-count // 56))
    shown = [shorten(names[i], 24) for i in ticks.tolist()]
    cell = max(min(40, 1340 // count), 1)
    words = 60 + 9 * max(map(len, shown))
    side = max(cell * count, 240)
    canvas = Canvas(words + side + 170, 50 + side + words)
    axes = canvas.axes(words, 50, side, side)
    drawn = axes.imshow(
        shares, vmin=0, vmax=1, cmap=COLORMAPS["share"], interpolation="nearest", aspect="auto"
    )
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set_title(
        f"top-1 {percent(figures['accuracy'], 1)} of {figures['examples']:,} images", loc="left"
    )
    axes.set_xticks(ticks, shown, rotation=90, fontsize=11)
    axes.set_yticks(ticks, shown, fontsize=11)
    bar = canvas.axes(words + side + 24, 50, 18, min(side, 500))
    canvas.figure.colorbar(drawn, cax=bar, label="share of the class")
    return canvas.figure


@styled
def draw_tendency(picture: np.ndarray, arrows: np.ndarray, layout: TokenLayout) -> Figure:
    """Where the patches of one image lean, in the first, the middle and the last layer.

    Args:
      picture: uint8 `[h, w, 3]`.
      arrows: tendency `[L, P, 2]`, (row, col) in patches; NaN for patches without a field.
      layout: the grid of patches.
    """
    depth, rows, cols = len(arrows), layout.rows, layout.cols
    height, width = picture.shape[:2]
    layers = sorted({0, depth // 2, depth - 1})
    cell = max(round(360 / cols), 2)
    wide, high = cell * cols, max(round(cell * height / width * cols / rows), 2) * rows
    canvas = Canvas(
        2 * MARGIN + max(len(layers) * (wide + GAP), 620) - GAP, _TOP + high + _WHEEL + GAP
    )
    canvas.text(MARGIN, 18, "Tendency of each patch's field", fontsize=17, fontweight="bold")
    # One scale for all layers, so that they can be compared.
    full = full_length(arrows[layers])
    luma = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    stride = -(-max(rows, cols) // 20)
    shrink = 1.0
    for place, layer in enumerate(layers):
        axes = canvas.axes(MARGIN + place * (wide + GAP), _TOP, wide, high)
        # Dark and without colours: short arrows are nearly white.
        axes.imshow(0.45 * luma, cmap="gray", vmin=0, vmax=255, aspect="auto",
                    extent=(0, cols, rows, 0), label="picture")  # fmt: skip
        _, shrink = draw_arrows(axes, arrows[layer], rows, cols, full, stride)
        axes.set(xlim=(0, cols), ylim=(rows, 0), label=f"layer {layer}")
        axes.set_title(f"layer {layer}")
        axes.set_axis_off()
    below = _TOP + high + GAP / 2
    draw_wheel(canvas.axes(MARGIN, below, _WHEEL, _WHEEL), full)
    every = f"one arrow for {stride} x {stride} patches" if stride > 1 else "one arrow a patch"
    canvas.text(
        MARGIN + _WHEEL + 18, below + 8,
        f"hue: direction, saturation: length, full at {full:.2g} patches\n"
        f"{every}, lengths drawn x {shrink:.2g}",
        color=MUTED, fontsize=12.5, linespacing=1.5,
    )  # fmt: skip
    return canvas.figure


@styled
def draw_arms(arms: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> Figure:
    """Held-out accuracy against the epoch: the mean of each arm's runs, and all of them.

    Args:
      arms: by name, each run as pairs of (epoch, accuracy); runs of an arm have the same epochs.
    """
    figure, axes = _arms_figure(arms, lambda values: percent(values[:, -1].mean(), 1))
    axes.set(xlabel="epoch", ylabel="held-out top-1 (share of images)")
    # Best first, as the lines end.
    handles, labels = axes.get_legend_handles_labels()
    ends = [-np.mean([run[-1][1] for run in runs]) for runs in arms.values()]
    order = np.argsort(ends, kind="stable")
    axes.legend([handles[k] for k in order], [labels[k] for k in order], loc="lower right")
    return figure


@styled
def draw_window_areas(arms: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Figure:
    """Mean area of predicted windows by layer: the mean of each arm's runs, and all of them.

    Args:
      arms: by name, each run as pairs of (layer, share of the grid).
    """
    figure, axes = _arms_figure(arms, lambda values: f"{percent(values.mean(), 0)} of the grid")
    axes.set(xlabel="layer", ylabel="window area (share of the grid)", ylim=(0, 1.02))
    axes.set_xticks([layer for layer, _ in next(iter(arms.values()))[0]])
    axes.legend(loc="lower left")
    return figure


def _arms_figure(
    arms: Mapping[str, Sequence[Sequence[tuple[int | float, float]]]],
    summary: Callable[[np.ndarray], str],
) -> tuple[Figure, Axes]:
    """Lines of arms and of their runs; `summary` says something of `[runs, points]`."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    others = itertools.cycle(_OTHERS)
    for name, runs in arms.items():
        arm = ARMS[name] if name in ARMS else Arm(name, next(others))
        how: Any = {"color": arm.color, "linestyle": arm.dashes}
        places = [place for place, _ in runs[0]]
        values = np.array([[value for _, value in run] for run in runs])
        label = f"{arm.label}: {summary(values)} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
        axes.plot(places, values.mean(axis=0), **how, label=label, linewidth=2.4)
        if len(runs) > 1:
            axes.plot(places, values.T, **how, linewidth=0.7, alpha=0.6)
    axes.grid(visible=True, alpha=0.3)
    if any(len(runs) > 1 for runs in arms.values()):
        axes.set_title("Thick: mean of the runs; thin: each run")
    return figure, axes
