"""Panels of pictures and maps that are drawn quickly, pixel for pixel as Matplotlib draws them.

Most of what a figure of this package shows are photographs and maps whose pixels cover a whole
number of the canvas's pixels. Matplotlib takes them for any other image, and prepares every panel
for ticks that it never has: together 40 % of the time of drawing (`docs/performance.md`).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.image import AxesImage

_Number: TypeAlias = float | int


class PanelAxes(Axes):
    """Axes for pictures, without lines and numbers around them.

    Ticks are not made before somebody asks for them (`set_axis_on`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `matplotlib.axes.Axes`."""
        self.begun = False
        super().__init__(*args, **kwargs)
        self.begun = True
        self.set_axis_off()

    def _init_axis(self) -> None:  # where Matplotlib has projections make theirs
        self.xaxis, self.yaxis = _PanelX(self), _PanelY(self)
        for axis, sides in ((self.xaxis, ("bottom", "top")), (self.yaxis, ("left", "right"))):
            for side in sides:
                self.spines[side].register_axis(axis)


class _Tickless:
    """Of an axis: what would make its first ticks just to set them up."""

    axes: PanelAxes

    def set_tick_params(self, *args: Any, **kwargs: Any) -> None:
        if self.axes.begun:
            super().set_tick_params(*args, **kwargs)  # type: ignore[misc]

    def set_clip_path(self, *args: Any, **kwargs: Any) -> None:
        if self.axes.begun:
            super().set_clip_path(*args, **kwargs)  # type: ignore[misc]
        else:
            Artist.set_clip_path(self, *args, **kwargs)  # type: ignore[arg-type]


class _PanelX(_Tickless, XAxis):
    pass


class _PanelY(_Tickless, YAxis):
    pass


class _CrispImage(AxesImage):
    """An image that is repeated where its pixels are of whole pixels, and resampled elsewhere."""

    def make_image(
        self, renderer: Any, magnification: _Number = 1.0, unsampled: bool = False
    ) -> tuple[Any, _Number, _Number, Any]:
        place = self._whole_pixels()
        if place is None or magnification != 1 or unsampled:
            return super().make_image(renderer, magnification, unsampled)
        left, bottom, across, down = place
        # The renderer's first row is the lowest.
        pixels = self._colors()[::-1].repeat(down, axis=0).repeat(across, axis=1)
        return pixels, left, bottom, None

    def _whole_pixels(self) -> tuple[int, int, int, int] | None:
        """Left and bottom pixel, columns and rows of pixels to one of the image, if whole."""
        if self.get_interpolation() != "nearest" or self.origin != "upper":
            return None
        left, right, bottom, top = self.get_extent()
        corners = self.get_transform().transform([(left, bottom), (right, top)])
        whole = np.rint(corners)
        # What lies beyond the axes is for Matplotlib to cut off.
        first, last = self.axes.bbox.get_points()
        inside = (whole >= first - 1e-6) & (whole <= last + 1e-6)
        if not np.allclose(corners, whole, rtol=0, atol=1e-6) or not inside.all():
            return None
        (x, y), (width, height) = whole[0].astype(int), (whole[1] - whole[0]).astype(int)
        rows, columns = self.get_size()
        if width < columns or height < rows or width % columns or height % rows:
            return None
        return int(x), int(y), int(width // columns), int(height // rows)

    def _colors(self) -> np.ndarray:
        values = self.get_array()
        assert values is not None
        return self.to_rgba(values, alpha=self.get_alpha(), bytes=True)


def show(
    axes: Axes,
    values: np.ndarray,
    extent: tuple[_Number, _Number, _Number, _Number],
    *,
    colors: str | None = None,
    limits: tuple[_Number, _Number] = (0.0, 1.0),
    opacity: np.ndarray | None = None,
    interpolation: str = "nearest",
    label: str = "",
    zorder: _Number = 0.0,
) -> AxesImage:
    """`Axes.imshow` for pictures and maps that fill their place; the limits of the axes stay.

    Args:
      axes: where to.
      values: uint8 `[h, w, 3]`, float `[h, w, 4]` in 0 to 1, or numbers `[h, w]` for a colour map;
        NaN is not drawn.
      extent: left, right, bottom and top edge in the units of the axes.
      colors: the colour map's name.
      limits: numbers at the ends of the colour map.
      opacity: `[h, w]` of a map.
      interpolation: as Matplotlib's.
      label: how tests and readers find it.
      zorder: what it lies over.
    """
    image = _CrispImage(
        axes, cmap=colors, interpolation=interpolation, origin="upper", extent=extent,
        resample=True, label=label, zorder=zorder,
    )  # fmt: skip
    image.set_data(np.ma.masked_invalid(values) if values.ndim == 2 else values)
    image.set_alpha(opacity)
    if colors is not None:
        image.set_clim(*limits)
    image.set_clip_path(axes.patch)
    axes.add_image(image)
    return image
