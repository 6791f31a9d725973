"""Windows that a window-free transformer predicts, beside those that an indicator gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from vit_interact.layout import TokenLayout
from vit_interact.viz.scene import Scene
from vit_interact.viz.sheet import COLUMNS, Sheet, draw_picture, panel_rows
from vit_interact.viz.style import MUTED, styled

# Of the queries whose windows are shown; bright on photographs, apart for colour-blind readers.
_QUERIES = ("#FFD400", "#00E5FF", "#FF5FA2")
_DASHES: Any = (0, (2, 2))
_LAYERS = 6


@styled
def draw_predicted_windows(
    pictures: np.ndarray,
    boxes: np.ndarray,
    goals: np.ndarray | None,
    layers: Sequence[int],
    layout: TokenLayout,
    title: str,
) -> Figure:
    """Windows of three patches of several images, by layer.

    Args:
      pictures: uint8 `[n, h, w, 3]`.
      boxes: predicted (top, left, bottom, right) in patches, `[L, n, G, P, 4]`; the groups of heads
        are drawn alike.
      goals: windows that they learn from, `[L, n, P, 4]`, or None.
      layers: numbers of the layers.
      layout: the grid of patches.
      title: of the figure.
    """
    columns = _chosen(len(layers))
    rows, cols = layout.rows, layout.cols
    count, (height, width) = len(pictures), pictures.shape[1:3]
    # Wide enough for title and legend.
    panel = max(2.1, 7.5 / len(columns))
    size = (panel * len(columns) + 0.3, panel * height / width * count + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(count, len(columns), squeeze=False)
    area = _areas(boxes).mean(axis=(1, 2, 3)) / (rows * cols)
    for (image, column), axes in np.ndenumerate(panels):
        layer = columns[column]
        extent = (0, cols, rows, 0)
        axes.imshow(pictures[image], extent=extent, interpolation="nearest", aspect="auto")
        goal = None if goals is None else goals[layer, image]
        _outline(axes, rows, cols, boxes[layer, image], goal)
        axes.set(xticks=[], yticks=[], xlim=(0, cols), ylim=(rows, 0))
        axes.spines[:].set_visible(False)
        if image == 0:
            axes.set_title(f"layer {layers[layer]}, area {area[layer]:.0%}")
    figure.suptitle(title, x=0.01, ha="left")
    shown = [
        Line2D([], [], color=_QUERIES[0], marker="s", linestyle="", alpha=0.75, label="patch"),
        Line2D([], [], color=_QUERIES[0], linewidth=2.4, label="its window (half let in)"),
    ]
    if goals is not None:
        dashed: Any = {"linewidth": 1.6, "linestyle": _DASHES, "label": "learned from"}
        shown.append(Line2D([], [], color=_QUERIES[0], **dashed))
    legend = figure.legend(handles=shown, loc="outside lower left", ncols=3, frameon=True)
    legend.get_frame().set(facecolor="#4D4D4D", linewidth=0)
    for text in legend.get_texts():
        text.set_color("white")
    return figure


@styled
def draw_predicted(data: xr.Dataset) -> Figure:
    """Predicted windows of three patches of one image, by layer, and those of the indicator.

    Args:
      data: the dataset of one image, with `predicted_window`.

    Returns:
      A figure with axes labelled `predicted L` for each layer `L` that is shown.
    """
    scene = Scene(data)
    boxes = scene.array("predicted_window")
    layers = [int(layer) for layer in np.atleast_1d(data["window_layer"].values)]
    chosen = _chosen(len(layers))
    lines = -(-len(chosen) // COLUMNS)
    note = "filled: the patch   line: its predicted window, where half is let in"
    measured = scene.array("window") if "window" in data and scene.layers else None
    note += "" if measured is None else "   dashed: the window of the indicator"
    sheet = Sheet(scene, "Predicted windows", [panel_rows(scene, 24.0)] * lines, note)
    for place, index in enumerate(chosen):
        layer = layers[index]
        title = f"layer {layer}: mean area {_areas(boxes[index]).mean() / scene.patches:.0%}"
        goal = None
        if measured is not None and layer in scene.layers:
            goal = measured[scene.layers.index(layer)]
            title += f" (indicator {_areas(goal).mean() / scene.patches:.0%})"
        axes = sheet.picture_axes(
            place % COLUMNS, sheet.tops[place // COLUMNS], title.replace("%", " %"),
            f"predicted {layer}",
        )  # fmt: skip
        axes.title.set_color(MUTED)
        draw_picture(axes, scene)
        _outline(axes, scene.rows, scene.cols, boxes[index], goal)
    return sheet.figure


def _outline(axes: Axes, rows: int, cols: int, boxes: np.ndarray, goals: np.ndarray | None) -> None:
    """Three patches, their predicted boxes `[G, P, 4]` and windows `[P, 4]`, in patches."""
    queries = [(rows * k // 4) * cols + cols * k // 4 for k in (1, 2, 3)]
    for query, color in zip(queries, _QUERIES, strict=True):
        row, col = divmod(query, cols)
        _box(axes, np.array([row, col, row + 1, col + 1]), color=color, alpha=0.75, linewidth=0)
        outline = {"fill": False, "edgecolor": color}
        if goals is not None:
            _box(axes, goals[query], **outline, linestyle=_DASHES, linewidth=1.6, label="goal")
        for own in boxes[:, query]:
            _box(axes, own, **outline, linewidth=2.4, label="predicted")


def _box(axes: Axes, box: np.ndarray, **style: Any) -> None:
    top, left, bottom, right = (float(edge) for edge in box)
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)


def _chosen(count: int) -> list[int]:
    """An even choice of layers, at most six."""
    return sorted(set(np.linspace(0, count - 1, _LAYERS).round().astype(int).tolist()))
