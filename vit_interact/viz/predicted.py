"""Windows that a window-free transformer predicts, beside those that an indicator gives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from vit_interact.layout import TokenLayout
from vit_interact.viz.image_data import ImageData
from vit_interact.viz.panels import PanelAxes, show
from vit_interact.viz.scene import Scene
from vit_interact.viz.sheet import (
    COLUMNS,
    MARGIN,
    Canvas,
    Sheet,
    draw_picture,
    interpolation,
    panel_rows,
)
from vit_interact.viz.style import percent, styled

# Of the queries whose windows are shown; bright on photographs, apart for colour-blind readers.
_QUERIES = ("#FFD400", "#00E5FF", "#FF5FA2")
# The first is drawn lowest: where edges coincide, those below still show at both sides.
_WIDTHS = (4.2, 2.8, 1.5)
_DASHES: Any = (0, (2, 2))
_DASHED = 1.8
_LAYERS = 6
# Pixels.
_GAP = 14
_TOP = 92
_LEGEND = 44


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
    # Patches of whole pixels, and panels wide enough together for title and legend.
    cell = max(round(max(210.0, 750 / len(columns)) / cols), 2)
    down = max(round(cell * height / width * cols / rows), 2)
    wide, high = cell * cols, down * rows
    canvas = Canvas(
        2 * MARGIN + len(columns) * (wide + _GAP) - _GAP,
        _TOP + count * (high + _GAP) + _LEGEND,
    )
    canvas.text(MARGIN, 18, title, fontsize=17, fontweight="bold")
    area = _areas(boxes).mean(axis=(1, 2, 3)) / (rows * cols)
    for image, (place, layer) in itertools.product(range(count), enumerate(columns)):
        left, top = MARGIN + place * (wide + _GAP), _TOP + image * (high + _GAP)
        axes = canvas.axes(left, top, wide, high, kind=PanelAxes)
        axes.set(xlim=(0, cols), ylim=(rows, 0), label=f"image {image}, layer {layers[layer]}")
        how = interpolation(axes, pictures[image])
        show(axes, pictures[image], (0, cols, rows, 0), interpolation=how)
        goal = None if goals is None else goals[layer, image]
        _outline(axes, rows, cols, boxes[layer, image], goal)
        if image == 0:
            axes.set_title(f"layer {layers[layer]}, area {percent(area[layer])}")
    color = _QUERIES[0]
    outline: Any = {"fill": False, "edgecolor": color, "path_effects": _halo(_WIDTHS[0])}
    shown: list[Any] = [
        Rectangle((0, 0), 1, 1, color=color, alpha=0.75, linewidth=0, label="a patch"),
        Rectangle((0, 0), 1, 1, linewidth=_WIDTHS[0], label="its window (half let in)", **outline),
    ]
    if goals is not None:
        dashed: Any = {"linewidth": _DASHED, "linestyle": _DASHES, "label": "learned from"}
        shown.append(
            Rectangle((0, 0), 1, 1, **{**outline, "path_effects": _halo(_DASHED)}, **dashed)
        )
    canvas.figure.legend(
        handles=shown, loc="lower left", ncols=3, borderaxespad=0,
        bbox_to_anchor=(MARGIN / canvas.width, 10 / canvas.height),
    )  # fmt: skip
    return canvas.figure


@styled
def draw_predicted(data: ImageData) -> Figure:
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
        title = f"layer {layer}: mean area {percent(_areas(boxes[index]).mean() / scene.patches)}"
        goal = None
        if measured is not None and layer in scene.layers:
            goal = measured[scene.layers.index(layer)]
            title += f" (indicator {percent(_areas(goal).mean() / scene.patches)})"
        axes = sheet.picture_axes(
            place % COLUMNS, sheet.tops[place // COLUMNS], title, f"predicted {layer}"
        )
        draw_picture(axes, scene)
        _outline(axes, scene.rows, scene.cols, boxes[index], goal)
    return sheet.figure


def _outline(axes: Axes, rows: int, cols: int, boxes: np.ndarray, goals: np.ndarray | None) -> None:
    """Three patches, their predicted boxes `[G, P, 4]` and windows `[P, 4]`, in patches."""
    queries = [(rows * k // 4) * cols + cols * k // 4 for k in (1, 2, 3)]
    for query, color in zip(queries, _QUERIES, strict=True):
        row, col = divmod(query, cols)
        _box(axes, np.array([row, col, row + 1, col + 1]), color=color, alpha=0.75, linewidth=0)
    for query, color, width in zip(queries, _QUERIES, _WIDTHS, strict=True):
        outline = {"fill": False, "edgecolor": color}
        for own in boxes[:, query]:
            effects = _halo(width)
            _box(axes, own, **outline, linewidth=width, label="predicted", path_effects=effects)
    # Above all windows: a guide's edge often lies on another patch's.
    for query, color in zip(queries, _QUERIES, strict=True):
        if goals is not None:
            how = {"linestyle": _DASHES, "linewidth": _DASHED, "path_effects": _halo(_DASHED)}
            _box(axes, goals[query], fill=False, edgecolor=color, label="goal", **how)


def _halo(width: float) -> list[Any]:
    """Dark at both sides, so that bright lines stand out on white, too."""
    return [Stroke(linewidth=width + 1.2, foreground="black", alpha=0.5), Normal()]


def _box(axes: Axes, box: np.ndarray, **style: Any) -> None:
    top, left, bottom, right = (float(edge) for edge in box)
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)


def _chosen(count: int) -> list[int]:
    """An even choice of layers, at most six."""
    return sorted(set(np.linspace(0, count - 1, _LAYERS).round().astype(int).tolist()))
