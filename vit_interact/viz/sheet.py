"""A figure laid out in pixels: header, columns of panels of the picture's shape, footers.

Places are computed, not searched for: Matplotlib's layout engines draw a figure several times, and
here the shapes of all panels are known beforehand. Each panel has the shape of the picture and
begins at a whole pixel, and each patch is of whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from vit_interact.viz import style
from vit_interact.viz.panels import PanelAxes, show
from vit_interact.viz.scene import Scene

MARGIN = 28.0
GAP = 28.0
COLUMN = 448.0
COLUMNS = 3
WIDTH = 2 * MARGIN + COLUMNS * COLUMN + (COLUMNS - 1) * GAP
HEADER = 92.0
TITLE = 34.0  # a panel's own title
FOOTER = 84.0  # a colour bar with ticks and label
TALLEST = 560.0
NARROWEST_BAR = 300.0

Pixels: TypeAlias = float | int

#: Quantile at the upper end of the colours: a few extreme patches must not darken all others.
UPPER = {"impact": 0.98, "interaction": 0.98}


class Canvas:
    """A Figure whose axes are placed in whole pixels from its top left corner.

    Attributes:
      figure: the Matplotlib figure, without pyplot.
      width: of the figure in pixels.
      height: of the figure in pixels.
    """

    def __init__(self, width: Pixels, height: Pixels) -> None:
        """Makes an empty figure; fractions of pixels are rounded up."""
        self.width, self.height = math.ceil(width), math.ceil(height)
        size = (self.width / style.DPI, self.height / style.DPI)
        self.figure = Figure(figsize=size, dpi=style.DPI)

    def text(self, left: Pixels, top: Pixels, words: str, **kwargs: object) -> None:
        """Text with its upper left corner at a pixel; dollar signs are no formulas."""
        self.figure.text(
            left / self.width,
            1 - top / self.height,
            words,
            **{"va": "top", "parse_math": False, **kwargs},  # type: ignore[arg-type]
        )

    def axes(
        self, left: Pixels, top: Pixels, width: Pixels, height: Pixels, kind: type[Axes] = Axes
    ) -> Axes:
        """Axes at pixels from the upper left corner."""
        bottom = self.height - top - height
        box = ((left, bottom), (left + width, bottom + height))
        axes = self.figure.add_axes((0, 0, 1, 1), axes_class=kind)
        whole = self.figure.bbox.size
        axes.set_position(
            Bbox(
                [
                    [_fraction(at, size) for at, size in zip(corner, whole, strict=True)]
                    for corner in box
                ]
            )
        )
        return axes

    def bar_at(
        self,
        image: AxesImage,
        left: Pixels,
        top: Pixels,
        width: Pixels,
        label: str,
        drawn: np.ndarray | None = None,
    ) -> Colorbar:
        """A horizontal colour bar.

        It ends in an arrow where something that is `drawn` (by default the image) lies beyond its
        last or first colour.
        """
        values: np.ma.MaskedArray = np.ma.masked_invalid(
            np.ma.asarray(image.get_array() if drawn is None else drawn)
        )
        low, high = image.get_clim()
        below, beyond = (bool(side.any()) for side in (values < low, values > high))
        bar = self.figure.colorbar(
            image,
            cax=self.axes(left, top, width, 15.0),
            orientation="horizontal",
            extend={(True, True): "both", (True, False): "min", (False, True): "max"}.get(
                (below, beyond), "neither"
            ),
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=4, pad=3)
        bar.set_label(label, labelpad=3)
        return bar


class Sheet(Canvas):
    """A canvas for one image: header, columns of panels of the picture's shape, footers.

    Attributes:
      scene: the image that is drawn.
      panel: width and height of one panel in pixels.
      tops: upper edges of the parts below the header, in pixels.
    """

    def __init__(
        self, scene: Scene, subject: str, heights: Sequence[Pixels], note: str = ""
    ) -> None:
        """Makes the figure and its header.

        Args:
          scene: the image to draw.
          subject: what the figure shows, first words of its title.
          heights: heights in pixels of the parts below the header; they add up.
          note: a third line, such as what hatching means.
        """
        header = HEADER + (26.0 if note else 0.0)
        whole = [math.ceil(height) for height in heights]
        super().__init__(WIDTH, header + sum(whole) + MARGIN / 2)
        self.scene = scene
        self.panel = panel_size(scene)
        self.tops = [header + sum(whole[:k]) for k in range(len(whole))]
        self.text(MARGIN, 22, scene.title(subject), fontsize=17, fontweight="bold")
        self.text(MARGIN, 56, scene.subtitle(), color=style.MUTED)
        if note:
            self.text(MARGIN, 82, note, color=style.MUTED, fontsize=12.5)

    def picture_axes(self, column: int, top: Pixels, title: str, label: str) -> Axes:
        """Axes in patches for one panel of a column; `label` is how tests and readers find it."""
        axes = self.axes(column_left(column), top + TITLE, *self.panel, kind=PanelAxes)
        high, wide = self.scene.extent
        axes.set(xlim=(0, wide), ylim=(high, 0), label=label)
        axes.set_title(title, parse_math=False)
        return axes

    def bar(
        self, image: AxesImage, column: int, top: Pixels, label: str, last: int | None = None
    ) -> Colorbar:
        """A colour bar in the footer below the panels from `column` to `last` that start at `top`.

        Without `last` it is that of one panel.
        """
        left = column_left(column)
        width = column_left(column if last is None else last) + self.panel[0] - left
        below = top + TITLE + math.ceil(self.panel[1]) + 10
        bar = self.bar_at(image, left, below, max(width, NARROWEST_BAR), label)
        bar.ax.locator_params(axis="x", nbins=5)
        return bar


def _fraction(pixel: Pixels, whole: float) -> float:
    """The share of a size that is this pixel, exactly where floating point allows it.

    Else a picture could begin a last bit before its pixel, and be smoothed over its neighbours.
    """
    share = pixel / whole
    near = (share, math.nextafter(share, -1), math.nextafter(share, 2))
    return next((one for one in near if one * whole == pixel), share)


def column_left(column: int) -> float:
    """Left edge of a column in pixels."""
    return MARGIN + column * (COLUMN + GAP)


def panel_size(scene: Scene) -> tuple[Pixels, Pixels]:
    """Width and height in pixels of a panel of the picture's shape, within a column."""
    return fitted(scene, COLUMN, TALLEST)


def fitted(scene: Scene, width: Pixels, height: Pixels) -> tuple[Pixels, Pixels]:
    """The largest panel of about the picture's shape in which every patch is of whole pixels.

    Else neighbouring patches would differ by a pixel, and edges of boxes and maps would blur. Very
    many patches, of less than two pixels each, get the exact shape instead.

    Args:
      scene: the image.
      width: largest width in pixels.
      height: largest height in pixels.
    """
    high, wide = scene.extent
    tall_over_wide = scene.patch_pixels[0] / scene.patch_pixels[1]
    across = math.floor(min(width / wide, height / (high * tall_over_wide)))
    down = round(across * tall_over_wide)
    if min(across, down) >= 2:
        return wide * across, high * down
    exact = min(width, height * scene.aspect)
    return exact, exact / scene.aspect


def panel_rows(scene: Scene, footer: Pixels = FOOTER) -> Pixels:
    """Height of one row of panels with titles and a footer."""
    return TITLE + panel_size(scene)[1] + footer


def draw_picture(axes: Axes, scene: Scene, colored: bool = True, light: float = 1.0) -> None:
    """The photograph as background, or a grid on grey if it was not kept.

    Args:
      axes: axes in patches.
      scene: the image.
      colored: False draws it grey, so that only data has colours.
      light: brightness kept, 0 to 1, for light marks on a dark ground.
    """
    high, wide = scene.extent
    picture = scene.picture if colored else scene.grey
    if picture is None:
        tone = str(0.92 * light)
        axes.add_patch(Rectangle((0, 0), wide, high, facecolor=tone, edgecolor="none", zorder=-2))
        axes.vlines(np.arange(1, wide), 0, high, colors=str(0.8 * light), linewidths=0.6, zorder=-1)
        axes.hlines(np.arange(1, high), 0, wide, colors=str(0.8 * light), linewidths=0.6, zorder=-1)
        return
    if light < 1:
        picture = (picture * np.float32(light)).astype(np.uint8)
    how = interpolation(axes, picture)
    show(axes, picture, (0, wide, high, 0), interpolation=how, zorder=-2, label="picture")


def interpolation(axes: Axes, picture: UInt8[np.ndarray, "y x 3"]) -> str:
    """How to draw a photograph over whole axes: crisp where its pixels are of whole pixels.

    Matplotlib's own choice depends on the last bits of where the axes lie.
    """
    zoom = axes.get_window_extent().width / picture.shape[1]
    crisp = zoom > 3 or (zoom > 0.5 and abs(zoom - round(zoom)) < 1e-6)
    return "nearest" if crisp else "hanning"


def draw_map(
    axes: Axes,
    scene: Scene,
    values: Float[np.ndarray, "R C"],
    quantity: str,
    *,
    limits: tuple[float, float] | None = None,
    overlay: bool = False,
    hatched: bool = True,
) -> AxesImage:
    """A map with one value a patch; patches without a number are hatched.

    Args:
      axes: axes in patches.
      scene: the image.
      values: `[R, C]`, NaN where nothing is defined.
      quantity: a key of `style.COLORMAPS`.
      limits: values at the ends of the colours; `color_limits` with `UPPER` if None.
      overlay: True lets the picture below show through, the more the lower the value.
      hatched: False leaves patches without a number bare.
    """
    finite = np.isfinite(values)
    low, high = limits or color_limits(values, UPPER.get(quantity, 1.0))
    opacity = None
    if overlay:
        # Weak values let the picture through, strong ones show the colour of the bar.
        strength = np.clip((np.where(finite, values, low) - low) / (high - low), 0.0, 1.0)
        opacity = np.where(finite, 0.3 + 0.5 * strength, 0.0)
    if hatched and not finite.all():
        hatch(axes, ~finite)
    return show(
        axes,
        values,
        (0, scene.cols, scene.rows, 0),
        colors=style.COLORMAPS[quantity],
        limits=(low, high),
        opacity=opacity,
        label=quantity,
    )


def hatch(axes: Axes, missing: Bool[np.ndarray, "R C"]) -> None:
    """Grey hatched patches: nothing is defined there."""
    patches = [Rectangle((col, row), 1, 1) for row, col in np.argwhere(missing)]
    cover = PatchCollection(
        patches,
        facecolor=style.MISSING,
        edgecolor=style.RC["hatch.color"],
        hatch="///",
        linewidth=0,
    )
    cover.set_label("missing")
    axes.add_collection(cover, autolim=False)


def color_limits(values: np.ndarray, upper: float = 1.0) -> tuple[float, float]:
    """Values at the ends of the colours.

    Args:
      values: a map, NaN where nothing is defined.
      upper: quantile at the upper end; below 1 the few highest patches share the last colour and
        the rest keeps its contrast.

    Returns:
      The smallest finite value and the quantile; from 0 to its value if the map is constant, so
      that the colours of a share never go beyond 1.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(np.quantile(finite, upper))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    low, high = min(low, 0.0), max(float(finite.max()), 0.0)
    return (low, high) if low < high else (0.0, 1.0)
