"""Contact sheets: all images of a folder of analyses at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from vit_interact.viz import style
from vit_interact.viz.fields import draw_arrows, full_length
from vit_interact.viz.image_data import ImageData
from vit_interact.viz.panels import PanelAxes, show
from vit_interact.viz.png import LEVELS, save
from vit_interact.viz.scene import Scene
from vit_interact.viz.sheet import UPPER, Pixels, color_limits, fitted
from vit_interact.viz.wheel import draw_wheel

_ACROSS = 3
_THUMB = 148.0
_CELL = 3 * _THUMB + 2 * 6
_GAP = 28
_MARGIN = 28.0
_TOP = 132.0
_WORDS = 66  # height of the two lines below each image
_WIDTH = 2 * _MARGIN + _ACROSS * _CELL + (_ACROSS - 1) * _GAP


def contact_sheet(
    images: Sequence[ImageData], path: Path, start: int = 0, count: int | None = None
) -> Path:
    """Draws a sheet as a PNG: of each image the picture, impact over it, arrows of tendency.

    Args:
      images: those of this sheet, `ds.isel(image=k)` of `vit_interact.analyze`.
      path: the file; `stems.sheets` names them.
      start: how many images came on sheets before.
      count: images on all sheets; those of this one if None.

    Returns:
      The path.

    Raises:
      ValueError: if there are no images.
    """
    if not images:
        raise ValueError("the dataset holds no images, so there is nothing for a contact sheet")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(draw_contact_sheet(images, start, count), path, LEVELS[:2])


@style.styled
def draw_contact_sheet(
    images: Sequence[ImageData], start: int = 0, count: int | None = None
) -> Figure:
    """One contact sheet.

    Args:
      images: those of this sheet.
      start: how many images came on sheets before.
      count: images on all sheets; those of this one if None.

    Returns:
      A figure whose axes `sheet` holds for each image its picture, its impact and its arrows.
    """
    scenes = [Scene(one) for one in images]
    # One shape for all: a dataset has one size of pictures.
    thumb = fitted(scenes[0], _THUMB, 1.6 * _THUMB)
    cell = math.ceil(thumb[1]) + _WORDS
    height = math.ceil(_TOP + -(-len(scenes) // _ACROSS) * cell + _MARGIN / 2)
    figure = Figure(figsize=(_WIDTH / style.DPI, height / style.DPI), dpi=style.DPI)
    # One axes in pixels for everything: a hundred of them would take seconds.
    axes = figure.add_axes((0, 0, 1, 1), axes_class=PanelAxes, label="sheet")
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    for k, scene in enumerate(scenes):
        down, across = divmod(k, _ACROSS)
        _draw_cell(axes, scene, _MARGIN + across * (_CELL + _GAP), _TOP + down * cell, thumb)
    total = len(scenes) if count is None else count
    shown = f"{total} image{'s' * (total != 1)}"
    if len(scenes) < total:
        shown = f"images {start + 1} to {start + len(scenes)} of {total}"
    model = style.shorten(str(images[0].attrs.get("model", "")), 40)
    indicator = style.indicator_style(str(images[0].attrs.get("indicator", "unknown"))).label
    axes.text(_MARGIN, 24, f"{shown}  ·  {model}", fontsize=17, fontweight="bold", va="top",
              parse_math=False)  # fmt: skip
    axes.text(
        _MARGIN,
        60,
        f"indicator: {indicator}\npicture  |  received impact over it  |  tendency of each patch",
        color=style.MUTED,
        va="top",
        linespacing=1.4,
        parse_math=False,
    )
    _draw_legends(figure, height)
    return figure


def _draw_cell(
    axes: Axes, scene: Scene, left: float, top: float, thumb: tuple[Pixels, Pixels]
) -> None:
    """Picture, impact, arrows and two lines of words of one image."""
    width, height = thumb
    high, wide = scene.extent
    unit = (height / high, width / wide)
    impact = scene.grid("combined_received_impact")
    low, most = color_limits(impact, UPPER["impact"])
    grey = scene.grey if scene.grey is not None else np.full((1, 1, 3), 225, np.uint8)
    color = scene.picture if scene.picture is not None else grey
    for column, ground in enumerate((color, grey * np.float32(0.8), grey * np.float32(0.4))):
        x = left + column * (width + 6)
        # Plain thinning to about the thumbnail's size; Matplotlib smooths the rest.
        step = max(1, round(min(ground.shape[:2]) / (2 * _THUMB)))
        thinned = ground[::step, ::step].astype(np.uint8)
        show(axes, thinned, (x, x + width, top + height, top), interpolation="auto")
    x = left + width + 6
    finite = np.isfinite(impact)
    strength = np.clip((np.where(finite, impact, low) - low) / (most - low), 0, 1)
    show(
        axes,
        impact,
        (x, x + scene.cols * unit[1], top + scene.rows * unit[0], top),
        colors=style.COLORMAPS["impact"],
        limits=(low, most),
        opacity=np.where(finite, 0.3 + 0.5 * strength, 0.0),
        label="impact",
    )
    vectors = scene.array("combined_tendency")
    stride = -(-max(scene.rows, scene.cols) // 10)
    corner = (top, left + 2 * (width + 6))
    full = full_length(vectors)
    quiver, _ = draw_arrows(axes, vectors, scene.rows, scene.cols, full, stride, corner, unit)
    quiver.width = 0.016
    name = style.shorten(scene.name, 46)
    lines = ((name, style.INK, 6), (scene.prediction(36), style.MUTED, 27))
    for words, ink, below in lines:
        axes.text(left, top + height + below, words, color=ink, fontsize=12.5, va="top",
                  parse_math=False)  # fmt: skip


def _draw_legends(figure: Figure, height: int) -> None:
    """Colour bar and wheel in the upper right corner."""
    place = ((_WIDTH - 580) / _WIDTH, 1 - 66 / height, 250 / _WIDTH, 14 / height)
    bar = figure.colorbar(
        ScalarMappable(cmap=style.COLORMAPS["impact"]),
        cax=figure.add_axes(place),
        orientation="horizontal",
        ticks=[0, 1],
    )
    bar.ax.set_xticklabels(["lowest", f"top {style.percent(1 - UPPER['impact'])}"])
    bar.ax.set_title("received impact, image by image", color=style.MUTED, fontsize=12.5)
    bar.outline.set_visible(False)
    wheel = figure.add_axes(((_WIDTH - 252) / _WIDTH, 1 - 112 / height, 88 / _WIDTH, 88 / height))
    draw_wheel(wheel, 1.0, 90)
    figure.text((_WIDTH - 152) / _WIDTH, 1 - 34 / height, "hue: direction\nsaturation:\nlength",
                va="top", color=style.MUTED, fontsize=12.5)  # fmt: skip
