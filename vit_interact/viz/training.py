"""Pictures of a training run: its curves, and what it confuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_interact.layout import TokenLayout
from vit_interact.viz.fields import draw_arrows, full_length
from vit_interact.viz.style import shorten, styled

_TRAIN, _VAL = "#4D4D4D", "#D55E00"
# Okabe and Ito (2008).
_ARMS = ("#4D4D4D", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")


@styled
def draw_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy and learning rate against the step.

    Args:
      lines: of `metrics.jsonl`, each with `step` and figures such as `train/loss`.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name, unit in ((loss, "loss", "loss (nats)"), (accuracy, "accuracy", "top-1")):
        _line(axes, lines, f"train/{name}", "training, as augmented", _TRAIN)
        _line(axes, lines, f"val/{name}", "validation", _VAL, marker="o", markersize=3)
        axes.set(xlabel="step", ylabel=unit)
    if accuracy.lines:
        accuracy.legend(loc="best")
    accuracy.set_ylim(0, 1)
    _line(rate, lines, "train/rate", "", _TRAIN)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.set_ylim(bottom=0)
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
    side = float(np.clip(2 + 0.16 * count, 5, 15))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set_title(f"top-1 {figures['accuracy']:.1%} of {figures['examples']:,} images", loc="left")
    # Of names that would overlap, an even choice is shown.
    ticks = np.arange(0, count, -(-count // 110))
    shown = [shorten(names[i], 24) for i in ticks.tolist()]
    size = float(np.clip(500 / len(ticks), 5, 9))
    axes.set_xticks(ticks, shown, rotation=90, fontsize=size)
    axes.set_yticks(ticks, shown, fontsize=size)
    figure.colorbar(drawn, label="share of the class", shrink=0.7)
    return figure


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
    figure = Figure(figsize=(3.6 * len(layers) + 0.4, 4.1), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        axes.imshow(picture // 2 + 128)
        full = full_length(arrows[layer])
        _, shrink = draw_arrows(
            axes, arrows[layer], rows, cols, full, stride=-(-max(rows, cols) // 20),
            unit=(height / rows, width / cols),
        )  # fmt: skip
        axes.set_title(f"layer {layer}: arrows x {shrink:.2g}")
        axes.set_xlabel(f"full colour from {full:.2g} patches")
        axes.set(xticks=[], yticks=[])
    figure.suptitle("Tendency of each patch's field")
    return figure


@styled
def draw_arms(arms: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> Figure:
    """Held-out accuracy against the epoch: the mean of each arm's runs, and all of them.

    Args:
      arms: by name, each run as pairs of (epoch, accuracy); runs of an arm have the same epochs.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, runs) in enumerate(arms.items()):
        color, style = _ARMS[index % len(_ARMS)], "-" if index < len(_ARMS) else "--"
        epochs = [epoch for epoch, _ in runs[0]]
        values = np.array([[value for _, value in run] for run in runs])
        last = f"{values[:, -1].mean():.1%}".replace("%", " %")
        label = f"{name}: {last} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
        axes.plot(epochs, values.mean(axis=0), style, color=color, label=label, linewidth=2.2)
        if len(runs) > 1:
            axes.plot(epochs, values.T, style, color=color, linewidth=0.7, alpha=0.6)
    axes.set(xlabel="epoch", ylabel="held-out top-1")
    axes.legend(loc="lower right")
    if any(len(runs) > 1 for runs in arms.values()):
        axes.set_title("Thick: mean of the runs; thin: each run")
    return figure
