"""Panels are drawn as Matplotlib would, pixel for pixel."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.axis
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_interact.viz import panels, style
from vit_interact.viz.png import pixels

_SIDE = 112


def _figure(kind: type[Axes]) -> tuple[Figure, Axes]:
    """An axes of `_SIDE` pixels that begins at whole pixels, 16 patches across."""
    figure = Figure(figsize=(2, 2), dpi=style.DPI)
    place = (20 / 200, 40 / 200, _SIDE / 200, _SIDE / 200)
    axes = figure.add_axes(place, axes_class=kind)
    axes.set(xlim=(0, 16), ylim=(16, 0))
    axes.set_axis_off()
    return figure, axes


def _values(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "photograph":
        return rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    if kind == "shade":
        return rng.uniform(0, 1, (16, 16, 4)).astype(np.float32)
    values = rng.normal(size=(16, 16)).astype(np.float32)
    values[3, 4:6] = np.nan
    return values


@pytest.mark.parametrize("kind", ["photograph", "shade", "map", "map that shows what is below"])
@pytest.mark.parametrize(
    ("name", "extent"),
    [
        ("whole", (0, 16, 16, 0)),
        ("part", (0, 8, 8, 0)),
        ("shifted", (1, 9, 15, 7)),
        ("beyond the axes", (-8, 8, 24, 8)),
        ("pixels apart", (0, 15, 15.3, 0)),
        ("smaller than its pixels", (0, 2, 2, 0)),
    ],
)
def test_show_draws_what_imshow_draws(
    kind: str, name: str, extent: tuple[float, float, float, float]
) -> None:
    values = _values(kind)
    mapped: dict[str, Any] = {"colors": "inferno", "limits": (-1.0, 1.5)}
    plain: dict[str, Any] = {"cmap": "inferno", "vmin": -1.0, "vmax": 1.5}
    if values.ndim == 3:
        mapped, plain = {}, {}
    if "below" in kind:
        opacity = np.random.default_rng(1).uniform(0.3, 0.8, values.shape)
        mapped["opacity"] = plain["alpha"] = opacity
    with mpl.rc_context(style.RC):
        quick, axes = _figure(panels.PanelAxes)
        axes.set_facecolor("teal")
        panels.show(axes, values, extent, **mapped)
        slow, axes = _figure(Axes)
        axes.imshow(np.ma.masked_invalid(values) if values.ndim == 2 else values, extent=extent,
                    interpolation="nearest", aspect="auto", **plain)  # fmt: skip
        axes.set(xlim=(0, 16), ylim=(16, 0))
        drawn, expected = pixels(quick, style.DPI), pixels(slow, style.DPI)
    assert (drawn != 255).any(), name
    np.testing.assert_array_equal(drawn, expected)


def test_photographs_that_are_smoothed_are_left_to_matplotlib() -> None:
    values = _values("photograph")
    with mpl.rc_context(style.RC):
        quick, axes = _figure(panels.PanelAxes)
        panels.show(axes, values, (0, 16, 16, 0), interpolation="hanning")
        slow, axes = _figure(Axes)
        axes.imshow(values, extent=(0, 16, 16, 0), interpolation="hanning", aspect="auto")
        np.testing.assert_array_equal(pixels(quick, style.DPI), pixels(slow, style.DPI))


def test_panels_make_no_tick_before_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    begin = matplotlib.axis.Tick.__init__

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axis.Tick, "__init__", count)
    figure, axes = _figure(panels.PanelAxes)
    panels.show(axes, _values("map"), (0, 16, 16, 0), colors="inferno")
    bare = pixels(figure, style.DPI)
    assert not made
    axes.set_axis_on()
    axes.tick_params(length=9, color="red")
    assert (pixels(figure, style.DPI) != bare).any()
    assert made
    assert axes.xaxis.get_major_ticks()[0].tick1line.get_markersize() == 9
