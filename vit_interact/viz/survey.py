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

from vit_interact.viz.png import FLAT, save
from vit_interact.viz.sheet import MARGIN, Canvas
from vit_interact.viz.style import COLORMAPS, INK, UNITS, indicator_style, percent, styled

# Of the median, on the blues of a histogram.
_MEDIAN = "#D55E00"
_TITLE = 34  # pixels above a panel
_LEFT: Any = {"x": 0.01, "ha": "left"}


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
    # Stores from before values were counted have none.
    if f"{design['indicators'][0]}_value_histogram" in dataset:
        figures["values"] = draw_values(dataset)
    if design["coverages"]:
        figures["windows"] = draw_windows(dataset)
    written = []
    for name, figure in figures.items():
        written.append(save(figure, folder / f"{name}.png", FLAT))
    return written


@styled
def draw_kernel(dataset: Any, indicator: str) -> Figure:
    """Mean impact by offset from the query, one panel a layer, one logarithmic colour scale."""
    mean = dataset[f"{indicator}_kernel_mean"]
    values, counts = mean.values, dataset[f"{indicator}_kernel_count"].values
    values = np.where((counts > 0) & (values > 0), values, np.nan)
    depth = len(values)
    across = min(depth, 6 if depth > 4 else depth)
    rows, cols = dataset["row_offset"].values, dataset["col_offset"].values
    # Every offset is of whole pixels.
    cell = max(round(200 / max(len(rows), len(cols))), 1)
    wide, high = cell * len(cols), cell * len(rows)
    pitch, drop = max(wide, 110) + 20, high + _TITLE
    left, top = MARGIN + 70, 64 + _TITLE
    bottom = top + math.ceil(depth / across) * drop
    canvas = Canvas(max(left + across * pitch + MARGIN, 700), bottom + 110)
    style = indicator_style(indicator)
    title = f"{style.label}: mean interaction by offset of the key from the query"
    canvas.text(MARGIN, 18, f"{title}, {_images(dataset)}", fontsize=15)
    extent = (cols[0] - 0.5, cols[-1] + 0.5, rows[-1] + 0.5, rows[0] - 0.5)
    known = values[np.isfinite(values)]
    # The faintest hundredth would stretch the scale over decades that nobody sees.
    low, high_end = (np.quantile(known, 0.01), known.max()) if len(known) else (0.1, 1.0)
    norm = LogNorm(low, max(high_end, low * 1.01))
    shown = None
    for layer in range(depth):
        line, place = divmod(layer, across)
        axis = canvas.axes(left + place * pitch, top + line * drop, wide, high)
        axis.set(xlim=extent[:2], ylim=extent[2:], label=f"layer {layer}")
        axis.set_title(f"layer {layer}")
        axis.set(xticks=_three(cols), yticks=_three(rows))
        axis.tick_params(labelleft=place == 0, labelbottom=layer + across >= depth)
        if np.isfinite(values[layer]).any():
            shown = axis.imshow(
                values[layer], norm=norm, cmap=COLORMAPS["interaction"], extent=extent,
                interpolation="nearest", aspect="auto",
            )  # fmt: skip
        else:
            axis.text(0.5, 0.5, "all zero", ha="center", transform=axis.transAxes)
        if place == 0:
            axis.set_ylabel("rows (patches)")
        if layer + across >= depth:
            axis.set_xlabel("columns (patches)")
    if shown is not None:
        unit = f"mean impact ({UNITS['interaction']})"
        across_all = canvas.width - left - MARGIN
        canvas.bar_at(shown, left, bottom + 36, across_all, unit, drawn=values)
    return canvas.figure


def _three(offsets: np.ndarray) -> list[int]:
    """Ticks at the query itself and at about two thirds of the way to both ends."""
    reach = math.ceil(2 * int(offsets[-1]) / 3)
    return sorted({-reach, 0, reach})


@styled
def draw_values(dataset: Any) -> Figure:
    """How often each value of an indicator occurs, by layer: one panel an indicator.

    Values are entries of the rows times the number of patches, so that 1 is what each patch would
    take from each in an even row.
    """
    names = json.loads(dataset.attrs["design"])["indicators"]
    across = min(len(names), 3)
    down = math.ceil(len(names) / across)
    depth = dataset.sizes["layer"]
    figure = Figure(
        figsize=(6.6 * across + 1.3, (0.27 * depth + 1.9) * down + 0.5), layout="constrained"
    )
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    shown: list[Any] = []
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_visible(False)
            continue
        counts = dataset[f"{names[place]}_value_histogram"].values.astype(float)
        edges = dataset[f"{names[place]}_value_edges"].values.astype(float)
        total = counts.sum(axis=1, keepdims=True)
        shares = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
        # What lies below the first and above the last edge gets a bin of its own at the end.
        step = edges[1] / edges[0]
        ends = np.concatenate([[edges[0] / step], edges, [edges[-1] * step]])
        drawn = axis.pcolormesh(
            ends, np.arange(depth + 1) - 0.5, np.ma.masked_invalid(shares),
            cmap=COLORMAPS["share"], vmin=0,
        )  # fmt: skip
        shown.append(drawn)
        middle = np.array([_median(row, ends) for row in counts])
        axis.plot(middle, np.arange(depth), "o", color=_MEDIAN, markersize=5, label="median",
                  markeredgecolor="white")  # fmt: skip
        axis.axvline(1.0, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="even row")
        axis.set_xscale("log")
        axis.set_title(indicator_style(names[place]).label)
        layers = dataset["layer"].values
        axis.set_yticks(layers[:: -(-len(layers) // 12)])
        axis.set_ylim(depth - 0.5, -0.5)
    top = max(float(np.nanmax(one.get_array().filled(0))) for one in shown) or 1.0
    for one in shown:
        one.set_clim(0, top)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    for place in range(max(0, len(names) - across), len(names)):
        axes.flat[place].set_xlabel("value (share of the row times P; 1: even row)")
        axes.flat[place].tick_params(labelbottom=True)
    figure.colorbar(shown[0], ax=axes, label="share of the entries in a bin", pad=0.01)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2)
    what = f"How often values occur between patches, {_images(dataset)}"
    figure.suptitle(f"{what}; end bins hold all beyond", **_LEFT)
    return figure


def _median(counts: np.ndarray, ends: np.ndarray) -> float:
    """The value that half of the entries lie below, evenly within its bin in the logarithm."""
    total = counts.cumsum()
    if total[-1] == 0:
        return float("nan")
    bin_ = int(np.searchsorted(total, total[-1] / 2))
    inside = (total[-1] / 2 - (total[bin_] - counts[bin_])) / counts[bin_]
    return float(ends[bin_] * (ends[bin_ + 1] / ends[bin_]) ** inside)


@styled
def draw_fields(dataset: Any) -> Figure:
    """Spread, length of the tendency and entropy by depth; bands are one deviation of patches."""
    names = json.loads(dataset.attrs["design"])["indicators"]
    figure = Figure(figsize=(14, 4.9), layout="constrained")
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    what = f"Responsive fields by depth, {_images(dataset)}"
    figure.suptitle(f"{what}; bands: one standard deviation of patches", **_LEFT)
    return figure


@styled
def draw_distance(dataset: Any) -> Figure:
    """Mean attention distance of every head against depth, as Dosovitskiy et al. 2021 show it."""
    mean = dataset["attention_distance_mean"].values
    about = json.loads(dataset.attrs["about"])
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axis = figure.subplots()
    layers, color = np.arange(mean.shape[0]), indicator_style("attention").color
    for head in range(mean.shape[1]):
        axis.plot(layers, mean[:, head], "o", color=color, alpha=0.75, markersize=6)
    axis.plot(layers, mean.mean(axis=1), color=INK, label="mean over heads")
    axis.plot([], [], "o", color=color, label="one head")
    pixels = about["pixels_per_patch"][0]
    right = axis.secondary_yaxis("right", functions=(lambda d: d * pixels, lambda d: d / pixels))
    right.set_ylabel("pixels of the model's input")
    axis.set_ylim(bottom=0)
    _depth_axis(axis, dataset)
    axis.set_ylabel("mean attention distance (patches)")
    axis.legend(loc="best")
    figure.suptitle(f"Attention distance, {_images(dataset)}", **_LEFT)
    return figure


@styled
def draw_windows(dataset: Any) -> Figure:
    """Area and sides of windows against depth, for every coverage and indicator."""
    design = json.loads(dataset.attrs["design"])
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    axes = figure.subplots(1, 2)
    dashes = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 2, 1, 2))]
    for name in design["indicators"]:
        style = indicator_style(name)
        for place, coverage in enumerate(design["coverages"]):
            label = f"{style.label}, {percent(coverage)} held"
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    what = f"Adaptive windows by depth, {_images(dataset)}"
    figure.suptitle(f"{what}; bands: one standard deviation of patches", **_LEFT)
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
