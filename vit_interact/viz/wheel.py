"""Colours of directions: hue tells the angle, saturation the length, as for optical flow.

The cyclic map is a closed curve in OKLab (Björn Ottosson, 2020) whose lightness falls from green
to red. Readers who don't see red against green then see light against dark, and blue against
yellow carries the other axis. Its entries are equally far apart along the curve, so that equal
turns look equal.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIGHTNESS = 0.72  # mean lightness of the curve in OKLab, 0 to 1
_TILT = 0.10  # how much lighter green is, and how much darker red
_CHROMA = 0.131  # the largest that stays inside sRGB all around, with some room
_ENTRIES = 360

# OKLab -> cube roots of cone responses -> linear sRGB, constants of the definition.
_LAB_TO_CONES = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def oklab_to_srgb(lab: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """OKLab to gamma-coded sRGB in 0 to 1; colours outside of sRGB are clipped."""
    linear = np.clip((lab @ _LAB_TO_CONES.T) ** 3 @ _CONES_TO_RGB.T, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@functools.cache
def cyclic_lab() -> Float[np.ndarray, "n 3"]:
    """The cyclic map in OKLab: entry `k` of `n` is the colour of the angle `2 pi k / n`."""
    hue = np.linspace(0.0, 2 * np.pi, 7201)
    curve = np.stack(
        [_LIGHTNESS - _TILT * np.cos(hue), _CHROMA * np.cos(hue), _CHROMA * np.sin(hue)], axis=-1
    )
    length = np.concatenate([[0.0], np.linalg.norm(np.diff(curve, axis=0), axis=-1).cumsum()])
    wanted = np.arange(_ENTRIES) / _ENTRIES * length[-1]
    table = np.stack([np.interp(wanted, length, channel) for channel in curve.T], axis=-1)
    table.setflags(write=False)
    return table


def direction_colors(vectors: Float[np.ndarray, "*n 2"], full: float) -> Float[np.ndarray, "*n 3"]:
    """Colours in sRGB of `(row, col)` vectors.

    Args:
      vectors: `(row, col)` components, any leading axes; rows grow downwards.
      full: the length at which the colour is fully saturated; longer ones look the same.

    Returns:
      sRGB in 0 to 1: white for length 0. The hue turns from +column towards +row.

    Raises:
      ValueError: if `full` is not positive.
    """
    if not full > 0:
        raise ValueError(f"full must be a positive length, got {full}")
    table = cyclic_lab()
    angle = np.arctan2(vectors[..., 0], vectors[..., 1]) / (2 * np.pi)
    rim = table[np.round(angle * len(table)).astype(int) % len(table)]
    strength = np.clip(np.linalg.norm(vectors, axis=-1) / full, 0.0, 1.0)[..., None]
    white = np.array([1.0, 0.0, 0.0])
    return oklab_to_srgb(white + strength * (rim - white)).astype(vectors.dtype)


def draw_wheel(axes: Axes, full: float, pixels: int = 120) -> None:
    """Draws the colour wheel as a legend: centre 0, rim `full`, +row downwards as in pictures."""
    steps = (np.arange(pixels) + 0.5) / pixels * 2 - 1
    vectors = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)
    radius = np.linalg.norm(vectors, axis=-1)
    # One pixel of fading at the rim, in place of stairs.
    alpha = np.clip((1 - radius) * pixels / 2, 0.0, 1.0)
    colors = direction_colors(vectors * full, full)
    axes.imshow(
        np.concatenate([colors, alpha[..., None]], axis=-1), extent=(-full, full, full, -full)
    )
    axes.axhline(0, color="black", linewidth=0.5, alpha=0.4)
    axes.axvline(0, color="black", linewidth=0.5, alpha=0.4)
    axes.set(xlim=(-full * 1.02, full * 1.02), ylim=(full * 1.02, -full * 1.02))
    axes.set_axis_off()
    axes.set_label("wheel")
