"""A figure laid out in pixels: header, columns of panels of the picture's shape, footers.

Places are computed, not searched for: Matplotlib's layout engines draw a figure several times, and
here the shapes of all panels are known beforehand. Each panel has exactly the shape of the picture,
so patches are never stretched and their edges fall where the model cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from vit_interact.viz import style
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

#: Quantile at the upper end of the colours: a few extreme patches must not darken all others.
UPPER = {"impact": 0.98, "interaction": 0.98}


class Sheet:
    """A Figure whose axes are placed in pixels from its top left corner.

    Attributes:
      figure: the Matplotlib figure, without pyplot.
      scene: the image that is drawn.
      panel: width and height of one panel in pixels.
    """

    def __init__(
        self, scene: Scene, subject: str, heights: Sequence[float], note: str = ""
    ) -> None:
        """Makes the figure and its header.

        Args:
          scene: the image to draw.
          subject: what the figure shows, first words of its title.
          heights: heights in pixels of the parts below the header; they add up.
          note: a third line, such as what hatching means.
        """
        header = HEADER + (26.0 if note else 0.0)
        self.scene = scene
        self.panel = panel_size(scene)
        self.height = header + sum(heights) + MARGIN / 2
        self.figure = Figure(figsize=(WIDTH / style.DPI, self.height / style.DPI), dpi=style.DPI)
        self.tops = [header + sum(heights[:k]) for k in range(len(heights))]
        self.text(MARGIN, 22, scene.title(subject), fontsize=17, fontweight="bold")
        self.text(MARGIN, 56, scene.subtitle(), color=style.MUTED)
        if note:
            self.text(MARGIN, 82, note, color=style.MUTED, fontsize=12.5)

    def text(self, left: float, top: float | int, words: str, **kwargs: object) -> None:
        """Text with its upper left corner at a pixel; dollar signs are no formulas."""
        self.figure.text(
            left / WIDTH,
            1 - top / self.height,
            words,
            **{"va": "top", "parse_math": False, **kwargs},  # type: ignore[arg-type]
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at pixels from the upper left corner."""
        return self.figure.add_axes(
            (
                left / WIDTH,
                1 - (top + height) / self.height,
                width / WIDTH,
                height / self.height,
            )
        )

    def picture_axes(self, column: int, top: float, title: str, label: str) -> Axes:
        """Axes in patches for one panel of a column; `label` is how tests and readers find it."""
        axes = self.axes(column_left(column), top + TITLE, *self.panel)
        high, wide = self.scene.extent
        axes.set(xlim=(0, wide), ylim=(high, 0), label=label)
        axes.set_axis_off()
        axes.set_title(title, parse_math=False)
        return axes

    def bar(self, image: AxesImage, column: int, top: float, label: str) -> Colorbar:
        """A horizontal colour bar in the footer below a panel that starts at `top`.

        It ends in an arrow where some patches lie above its last colour.
        """
        width = max(self.panel[0], NARROWEST_BAR)
        place = self.axes(column_left(column), top + TITLE + self.panel[1] + 10, width, 15.0)
        drawn: np.ma.MaskedArray = np.ma.masked_invalid(np.ma.asarray(image.get_array()))
        beyond = bool((drawn.compressed() > image.get_clim()[1]).any())
        bar = self.figure.colorbar(
            image, cax=place, orientation="horizontal", extend="max" if beyond else "neither"
        )
        bar.outline.set_visible(False)
        bar.ax.locator_params(axis="x", nbins=5)
        bar.ax.tick_params(length=4, pad=3)
        bar.set_label(label, labelpad=3)
        return bar


def column_left(column: int) -> float:
    """Left edge of a column in pixels."""
    return MARGIN + column * (COLUMN + GAP)


def panel_size(scene: Scene) -> tuple[float, float]:
    """Width and height in pixels of a panel of the picture's shape, within a column."""
    width = min(COLUMN, TALLEST * scene.aspect)
    return width, width / scene.aspect


def panel_rows(scene: Scene, footer: float = FOOTER) -> float:
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
    axes.imshow(picture, extent=(0, wide, high, 0), aspect="auto", zorder=-2, label="picture")


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
    return axes.imshow(
        np.ma.masked_invalid(values),
        cmap=style.COLORMAPS[quantity],
        vmin=low,
        vmax=high,
        extent=(0, scene.cols, scene.rows, 0),
        interpolation="nearest",
        aspect="auto",
        alpha=opacity,
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
      The smallest finite value and the quantile; an interval around it if the map is constant.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(np.quantile(finite, upper))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    pad = 0.5 * abs(low) or 0.5
    return low - pad, high + pad
