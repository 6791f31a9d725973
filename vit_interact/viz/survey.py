"""Figures of a survey: interaction kernels, growth of fields, attention distance, windows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vit_interact.viz.style import indicator_style, styled


def draw_survey(dataset: Any, folder: Path) -> list[Path]:
    """Draws all figures of a store of `vit-interact statistics`.

    Args:
      dataset: the store, as an `xarray.Dataset`.
      folder: where PNGs go.

    Returns:
      The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    design = json.loads(dataset.attrs["design"])
    figures = {f"kernel_{name}": draw_kernel(dataset, name) for name in design["indicators"]}
    figures["fields"] = draw_fields(dataset)
    figures["attention_distance"] = draw_distance(dataset)
    if design["coverages"]:
        figures["windows"] = draw_windows(dataset)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=100)
    return written


@styled
def draw_kernel(dataset: Any, indicator: str) -> Figure:
    """Mean impact by offset from the query, one panel a layer, one logarithmic colour scale."""
    mean = dataset[f"{indicator}_kernel_mean"]
    values, counts = mean.values, dataset[f"{indicator}_kernel_count"].values
    values = np.where((counts > 0) & (values > 0), values, np.nan)
    depth = len(values)
    across = min(depth, 6 if depth > 4 else depth)
    down = math.ceil(depth / across)
    figure = Figure(figsize=(2.25 * across + 1.4, 2.35 * down + 0.9), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    rows, cols = dataset["row_offset"].values, dataset["col_offset"].values
    extent = (cols[0] - 0.5, cols[-1] + 0.5, rows[-1] + 0.5, rows[0] - 0.5)
    known = values[np.isfinite(values)]
    # The faintest hundredth would stretch the scale over decades that nobody sees.
    low, high = (np.quantile(known, 0.01), known.max()) if len(known) else (0.1, 1.0)
    shown = None
    for layer, axis in enumerate(axes.flat):
        if layer >= depth:
            axis.set_visible(False)
            continue
        axis.set_title(f"layer {layer}")
        if np.isfinite(values[layer]).any():
            norm = LogNorm(low, max(high, low * 1.01))
            shown = axis.imshow(values[layer], norm=norm, cmap="viridis", extent=extent)
        else:
            axis.text(0.5, 0.5, "all zero", ha="center", transform=axis.transAxes)
    style = indicator_style(indicator)
    figure.suptitle(f"{style.label}: mean interaction kernel, {_images(dataset)}")
    figure.supxlabel("column offset of the key from the query (patches)", fontsize="medium")
    figure.supylabel("row offset (patches)", fontsize="medium")
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, extend="min", shrink=0.9)
        bar.set_label("mean impact (share of the row)")
    return figure


@styled
def draw_fields(dataset: Any) -> Figure:
    """Spread, length of the tendency and entropy by depth; bands are one deviation of patches."""
    names = json.loads(dataset.attrs["design"])["indicators"]
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, what, label in (
        (axes[0], "spread", "spread (patches)"),
        (axes[1], "tendency", "length of the tendency (patches)"),
        (axes[2], "entropy", "entropy of the row (share of log P)"),
    ):
        for name in names:
            style = indicator_style(name)
            _line(axis, dataset, f"{name}_{what}", style.label, style.color)
        _depth_axis(axis, dataset)
        axis.set_ylabel(label)
    axes[0].legend(loc="best")
    figure.suptitle(f"Responsive fields by depth, {_images(dataset)}; band: one deviation")
    return figure


@styled
def draw_distance(dataset: Any) -> Figure:
    """Mean attention distance of every head against depth, as Dosovitskiy et al. 2021 show it."""
    mean = dataset["attention_distance_mean"].values
    about = json.loads(dataset.attrs["about"])
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axis = figure.subplots()
    layers = np.arange(mean.shape[0])
    for head in range(mean.shape[1]):
        axis.plot(layers, mean[:, head], "o", color="#56B4E9", alpha=0.75, markersize=5)
    axis.plot(layers, mean.mean(axis=1), color="#1b1f24", label="mean over heads")
    axis.plot([], [], "o", color="#56B4E9", label="one head")
    pixels = about["pixels_per_patch"][0]
    right = axis.secondary_yaxis("right", functions=(lambda d: d * pixels, lambda d: d / pixels))
    right.set_ylabel("pixels of the model's input")
    axis.set_ylim(bottom=0)
    _depth_axis(axis, dataset)
    axis.set_ylabel("mean attention distance (patches)")
    axis.legend(loc="best")
    figure.suptitle(f"Attention distance, {_images(dataset)}")
    return figure


@styled
def draw_windows(dataset: Any) -> Figure:
    """Area and sides of windows against depth, for every coverage and indicator."""
    design = json.loads(dataset.attrs["design"])
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    dashes = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 2, 1, 2))]
    for name in design["indicators"]:
        style = indicator_style(name)
        for place, coverage in enumerate(design["coverages"]):
            label = f"{style.label}, {coverage:.0%}"
            line = dashes[place % len(dashes)]
            key = f"{name}_window_area"
            _line(axes[0], dataset, key, label, style.color, line, coverage=place)
            for side, width in (("height", 1.0), ("width", 2.2)):
                values = dataset[f"{name}_window_{side}_mean"].values[place]
                axes[1].plot(values, color=style.color, linestyle=line, linewidth=width)
    for axis, label in ((axes[0], "window area (share of the grid)"), (axes[1], "side (patches)")):
        _depth_axis(axis, dataset)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
    axes[1].set_title("height (thin) and width (thick)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"Adaptive windows by depth, {_images(dataset)}; band: one deviation")
    return figure


def _line(
    axis: Axes, dataset: Any, key: str, label: str, color: str, dashes: Any = "-",
    coverage: int | None = None,
) -> None:  # fmt: skip
    pick = (lambda a: a) if coverage is None else (lambda a: a[coverage])
    seen = pick(dataset[f"{key}_count"].values) > 0
    mean = np.where(seen, pick(dataset[f"{key}_mean"].values), np.nan)
    deviation = np.sqrt(pick(dataset[f"{key}_variance"].values))
    layers = np.arange(len(mean))
    axis.plot(layers, mean, color=color, linestyle=dashes, marker="o", markersize=3, label=label)
    axis.fill_between(layers, mean - deviation, mean + deviation, color=color, alpha=0.12, lw=0)


def _depth_axis(axis: Axes, dataset: Any) -> None:
    layers = dataset["layer"].values
    axis.set_xticks(layers[:: max(1, len(layers) // 12)])
    axis.set_xlabel("layer")
    axis.grid(visible=True, alpha=0.3)


def _images(dataset: Any) -> str:
    return f"{json.loads(dataset.attrs['about'])['images']} images"
