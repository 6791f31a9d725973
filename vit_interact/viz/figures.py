"""Drawings of one analysed image, as Matplotlib figures and as PNG files.

Each `draw_...` takes the dataset of one image, `ds.isel(image=0)`, and returns a `Figure` made
without pyplot: nothing global changes, and notebooks show it as it is. `render_image` writes all of
them. What is drawn is what the dataset holds: artists carry its arrays unchanged.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from vit_interact.viz import style
from vit_interact.viz.fields import draw_field, draw_growth
from vit_interact.viz.image_data import ImageData
from vit_interact.viz.panels import PanelAxes, show
from vit_interact.viz.png import COARSE, LEVELS, render, write
from vit_interact.viz.predicted import draw_predicted
from vit_interact.viz.scene import (
    SAMPLE_SIDE,
    Scene,
    coverage_map,
    spaced_strongest,
    spread_sample,
)
from vit_interact.viz.sheet import (
    COLUMNS,
    FOOTER,
    MARGIN,
    TITLE,
    UPPER,
    WIDTH,
    Pixels,
    Sheet,
    color_limits,
    draw_map,
    draw_picture,
    fitted,
    hatch,
    panel_rows,
)
from vit_interact.viz.stems import applies

#: Shares of the patches that `draw_removal` greys out.
REMOVED_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)

_STRIP_ACROSS = 12
_STRIP_GAP = 12  # pixels at least between two maps
_STRIP_WORDS = 54  # pixels for two lines below a map
_UNDER_HEAT = 0.8  # brightness of pictures under heat, so that strong colours stand out


@style.styled
def draw_received_impact(data: ImageData) -> Figure:
    """How much every patch matters to the others: picture, overlay, map, and each layer.

    Args:
      data: the dataset of one image, as `vit_interact.analyze` makes it.

    Returns:
      A figure with axes labelled `picture`, `overlay`, `impact` and, where single layers were
      kept, `layers` (one map a layer, each on its own scale).
    """
    scene = Scene(data)
    impact = scene.grid("combined_received_impact")
    cell, strip = _strip_size(scene)
    blank = int((~np.isfinite(impact)).sum())
    note = f"Hatched: {blank} patches without a number." if blank else ""
    sheet = Sheet(scene, "Received impact", [panel_rows(scene), strip], note)
    top = sheet.tops[0]
    draw_picture(sheet.picture_axes(0, top, "Picture, as the model saw it", "picture"), scene)
    overlay = sheet.picture_axes(1, top, "Impact over the picture", "overlay")
    draw_picture(overlay, scene, colored=False, light=_UNDER_HEAT)
    draw_map(overlay, scene, impact, "impact", overlay=True)
    bare = sheet.picture_axes(2, top, "Impact alone", "impact")
    sheet.bar(draw_map(bare, scene, impact, "impact"), 1, top, _impact_unit(scene), last=2)
    if strip:
        _draw_layers(sheet, scene, cell)
    return sheet.figure


def _impact_unit(scene: Scene) -> str:
    """Label of the colour bar of the impact across layers."""
    return f"received impact ({style.combined_unit(str(scene.data.attrs.get('indicator', '')))})"


def _strip_size(scene: Scene) -> tuple[tuple[Pixels, Pixels], Pixels]:
    """Width and height of one small map of the strip of layers, and the strip's height."""
    count = len(scene.layers)
    if not count or "received_impact" not in scene.data:
        return (0.0, 0.0), 0.0
    across = min(count, _STRIP_ACROSS)
    widest = min((WIDTH - 2 * MARGIN + _STRIP_GAP) / across - _STRIP_GAP, 150.0)
    width, height = fitted(scene, widest, 170.0)
    return (width, height), TITLE + -(-count // _STRIP_ACROSS) * (math.ceil(height) + _STRIP_WORDS)


def _draw_layers(sheet: Sheet, scene: Scene, cell: tuple[Pixels, Pixels]) -> None:
    """The strip: all layers in one axes in pixels, since dozens of axes would be slow."""
    width, height = cell
    top = sheet.tops[1]
    unit = str(
        scene.data.attrs.get("indicator_unit")
        or style.indicator_style(str(scene.data.attrs.get("indicator", ""))).unit
    )
    sheet.text(
        MARGIN,
        top,
        f"Layer by layer, each on its own scale (in {style.shorten(unit, 60)})",
        fontsize=13.5,
    )
    strip_height = sheet.height - top - TITLE
    axes = sheet.axes(0.0, top + TITLE, WIDTH, strip_height, kind=PanelAxes)
    axes.set(xlim=(0, WIDTH), ylim=(strip_height, 0), label="layers")
    grid = (len(scene.layers), scene.rows, scene.cols)
    maps = scene.array("received_impact").reshape(grid)
    high, wide = scene.extent
    # Evenly over the width where the row is full.
    across = min(len(scene.layers), _STRIP_ACROSS)
    most = math.floor((WIDTH - 2 * MARGIN - width) / max(across - 1, 1))
    pitch = min(most, math.ceil(width) + 4 * _STRIP_GAP)
    for k, (layer, values) in enumerate(zip(scene.layers, maps, strict=True)):
        down, place = divmod(k, _STRIP_ACROSS)
        left, upper = MARGIN + place * pitch, down * (math.ceil(height) + _STRIP_WORDS)
        right, lower = left + width * scene.cols / wide, upper + height * scene.rows / high
        show(
            axes,
            values,
            (left, right, lower, upper),
            colors=style.COLORMAPS["impact"],
            limits=color_limits(values, UPPER["impact"]),
            label=f"layer {layer}",
        )
        told = f"layer {layer}\nmax {_plain(values.max(), 2)}"
        below = upper + math.ceil(height) + 6
        axes.text(left, below, told, va="top", fontsize=12.5, color=style.MUTED)
    # One legend for all: each map has its own numbers at the ends of the same colours.
    bar = sheet.axes(WIDTH - MARGIN - 240, top + 4, 150, 15)
    sheet.figure.colorbar(
        ScalarMappable(cmap=style.COLORMAPS["impact"]), cax=bar, orientation="horizontal", ticks=[]
    ).outline.set_visible(False)
    bar.set_label("colours of layers")
    sheet.text(WIDTH - MARGIN - 250, top, "lowest", ha="right", color=style.MUTED, fontsize=12.5)
    words = "highest" if UPPER["impact"] == 1 else f"top {style.percent(1 - UPPER['impact'])}"
    sheet.text(WIDTH - MARGIN - 80, top, words, color=style.MUTED, fontsize=12.5)


@style.styled
def draw_interaction(data: ImageData) -> Figure:
    """What the strongest patches take from the others, each with its window.

    Six patches of high received impact, close neighbours skipped. The patch itself is outlined and
    left out of its map, where its own share would drown the rest.

    Args:
      data: the dataset of one image.

    Returns:
      A figure with axes labelled `patch J` for patch number `J`, and one colour bar.
    """
    scene = Scene(data)
    impact = scene.grid("combined_received_impact")
    rows = scene.array("combined_interaction")
    windows = scene.array("combined_window")
    chosen = spaced_strongest(impact, 2 * COLUMNS)
    others = np.array(rows[chosen], np.float32)
    others[np.arange(len(chosen)), chosen] = np.nan
    others[~(rows[chosen] != 0).any(axis=-1)] = np.nan
    finite = others[np.isfinite(others)]
    top_share = float(np.quantile(finite, UPPER["interaction"])) if finite.size else 0.0
    limits = (0.0, top_share or 1.0)
    down = -(-len(chosen) // COLUMNS)
    heights = [panel_rows(scene, FOOTER if k == down - 1 else 18.0) for k in range(down)]
    note = (
        "Heat: the share of its row that the outlined patch takes from every other patch. "
        "Box: its window."
    )
    sheet = Sheet(scene, "Interactions of the strongest patches", heights or [0.0], note)
    image = None
    for k, patch in enumerate(chosen):
        row, col = divmod(int(patch), scene.cols)
        title = f"{k + 1}.  row {row}, column {col}  (impact {_plain(impact[row, col])})"
        top, column = sheet.tops[k // COLUMNS], k % COLUMNS
        axes = sheet.picture_axes(column, top, title, f"patch {patch}")
        draw_picture(axes, scene, colored=False, light=_UNDER_HEAT)
        values = others[k].reshape(scene.rows, scene.cols)
        if np.isfinite(values).any():
            image = draw_map(
                axes, scene, values, "interaction", limits=limits, overlay=True, hatched=False
            )
        else:
            hatch(axes, ~np.isfinite(values))
            axes.text(
                scene.cols / 2,
                scene.rows / 2,
                "a row of zeros: nothing to show",
                ha="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 5},
            )
        axes.add_patch(_box(windows[patch], "white", 2.4, "window"))
        axes.add_patch(_box(np.array([row, col, row + 1, col + 1]), style.HIGHLIGHT, 3.0, "query"))
    if image is not None:
        label = f"{style.UNITS['interaction']} (without the patch itself)"
        bar = sheet.bar(image, 0, sheet.tops[-1], label, last=min(len(chosen), COLUMNS) - 1)
        bar.ax.set_label("colour bar")
    return sheet.figure


def _plain(value: float | np.floating, digits: int = 3) -> str:
    """A number in about `digits` digits; exponents only where zeros would be longer."""
    number = float(value)
    if 10.0**digits <= abs(number) < 1e6:
        return f"{number:.0f}"
    return f"{number:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def _box(box: np.ndarray, color: str, width: float, label: str) -> Rectangle:
    """Outline of a `(top, left, bottom, right)` box in patches, dark around the colour."""
    top, left, bottom, right = (int(edge) for edge in box)
    return Rectangle(
        (left, top),
        right - left,
        bottom - top,
        fill=False,
        edgecolor=color,
        linewidth=width,
        label=label,
        clip_on=False,
        joinstyle="miter",
        path_effects=[Stroke(linewidth=width + 2, foreground="black", alpha=0.75), Normal()],
    )


@style.styled
def draw_windows(data: ImageData) -> Figure:
    """Adaptive windows: those of a sample, their areas, and how often each patch is in one.

    Args:
      data: the dataset of one image.

    Returns:
      A figure with axes labelled `window J` for the patches `J` of a sample, `area` and `coverage`.
    """
    scene = Scene(data)
    windows = scene.array("combined_window")
    blank = int(scene.blank_queries.sum())
    note = (
        f"Hatched: {blank} of {scene.patches} patches have a row of zeros, so no window."
        if blank
        else ""
    )
    sheet = Sheet(scene, "Adaptive windows", [panel_rows(scene)], note)
    top = sheet.tops[0]
    size = (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])
    _draw_tiles(sheet, scene, windows)
    area = np.where(scene.blank_queries, np.nan, size / scene.patches)
    area = area.reshape(scene.rows, scene.cols)
    axes = sheet.picture_axes(1, top, "Area of each patch's window", "area")
    sheet.bar(draw_map(axes, scene, area, "area"), 1, top, style.UNITS["area"])
    axes = sheet.picture_axes(2, top, "Windows that hold each patch", "coverage")
    covered = coverage_map(windows, scene.rows, scene.cols)
    sheet.bar(draw_map(axes, scene, covered, "coverage"), 2, top, style.UNITS["coverage"])
    return sheet.figure


def _draw_tiles(sheet: Sheet, scene: Scene, windows: np.ndarray) -> None:
    """Windows of a sample, a small picture for each: most overlap too much for one picture."""
    left, top = MARGIN, sheet.tops[0]
    sheet.text(left, top + 9, "Windows of a sample of patches", fontsize=13.5)
    sample = spread_sample(scene.rows, scene.cols)
    gap = 6
    width, height = fitted(scene, *((side - 2 * gap) / SAMPLE_SIDE for side in sheet.panel))
    high, wide = scene.extent
    for down, line in enumerate(sample):
        for across, patch in enumerate(line):
            x = left + across * (math.ceil(width) + gap)
            y = top + TITLE + down * (math.ceil(height) + gap)
            axes = sheet.axes(x, y, width, height, kind=PanelAxes)
            axes.set(xlim=(0, wide), ylim=(high, 0), label=f"window {patch}")
            draw_picture(axes, scene)
            row, col = divmod(int(patch), scene.cols)
            upper, first, lower, last = windows[patch]
            shade = np.zeros((scene.rows, scene.cols, 4), np.float32)
            shade[..., 3] = 0.68
            shade[upper:lower, first:last, 3] = 0
            show(axes, shade, (0, scene.cols, scene.rows, 0))
            if not scene.blank_queries[patch]:
                axes.add_patch(_box(windows[patch], "white", 1.6, "window"))
            query = np.array([row, col, row + 1, col + 1])
            axes.add_patch(_box(query, style.HIGHLIGHT, 2.0, "query"))
    sheet.text(
        left,
        top + TITLE + sheet.panel[1] + 12,
        "blue: the patch   bright, outlined: its window",
        color=style.MUTED,
        fontsize=12.5,
    )


@style.styled
def draw_removal(data: ImageData) -> Figure:
    """The least discriminative patches greyed out in order, at five shares, and the order itself.

    Args:
      data: the dataset of one image.

    Returns:
      A figure with axes labelled `removed S` for each share `S`, and `order`.
    """
    scene = Scene(data)
    order = scene.array("removal_order").astype(np.int64)
    heights = [panel_rows(scene, 18.0), panel_rows(scene)]
    sheet = Sheet(scene, "Removal of the least discriminative patches", heights)
    for k, share in enumerate(REMOVED_SHARES):
        gone = np.zeros(scene.patches, bool)
        gone[order[: int(share * scene.patches)]] = True
        left = f"{scene.patches - gone.sum()} of {scene.patches} patches stay"
        title = f"{style.percent(share)} removed, {left}"
        axes = sheet.picture_axes(
            k % COLUMNS, sheet.tops[k // COLUMNS], title, f"removed {share:g}"
        )
        draw_picture(axes, scene)
        cover = np.zeros((scene.rows, scene.cols, 4), np.float32)
        cover[..., :3] = to_rgb(style.MISSING)
        cover[..., 3] = gone.reshape(scene.rows, scene.cols)
        show(axes, cover, (0, scene.cols, scene.rows, 0), label="removed")
    place = np.empty(scene.patches)
    place[order] = np.arange(1, scene.patches + 1)
    axes = sheet.picture_axes(2, sheet.tops[1], "Order of removal", "order")
    image = draw_map(axes, scene, place.reshape(scene.rows, scene.cols), "order")
    bar = sheet.bar(image, 2, sheet.tops[1], style.UNITS["order"])
    bar.set_ticks(sorted({round(at) for at in np.linspace(1, scene.patches, 5)}))
    return sheet.figure


#: Stem of the PNG -> function that draws it.
FIGURES: Mapping[str, Callable[[ImageData], Figure]] = MappingProxyType(
    {
        "received_impact": draw_received_impact,
        "interaction": draw_interaction,
        "windows": draw_windows,
        "field": draw_field,
        "growth": draw_growth,
        "removal": draw_removal,
        "predicted": draw_predicted,
    }
)


def render_image(
    data: ImageData, folder: str | os.PathLike[str], stems: Iterable[str] = tuple(FIGURES)
) -> list[Path]:
    """Writes figures of one image as PNG files, each complete or not there.

    Args:
      data: the dataset of one image, `ds.isel(image=i)`.
      folder: where to write; made if it isn't there.
      stems: which of `FIGURES`; those that do not apply to the image are left out.

    Returns:
      The paths `folder/received_impact.png`, `interaction.png`, `windows.png`, `field.png`,
      `growth.png` and `removal.png`, in this order; for a window-free transformer `predicted.png`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # One figure is drawn while another is compressed.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        written = [
            # Six photographs under heat never fit at full depth: that try is left out.
            pool.submit(write, render(FIGURES[stem](data)), target / f"{stem}.png",
                        COARSE if stem == "interaction" else LEVELS)
            for stem in stems if applies(stem, data)
        ]  # fmt: skip
    return [file.result() for file in written]
