"""RandAugment's operations (Cubuk et al. 2020) and changes of colour, a batch at a time.

Nothing here runs one operation for each of its possible choices. The geometric ones are one affine
sampling, and those of single values one lookup table, whose 256 entries are cheap to make in every
way there is; an image that drew another operation gets the identity.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# RandAugment as timm's `rand-m9-mstd0.5-inc1` has it: setting = base + slope * level / 10, the
# second term with a random sign where it has one, and cut to a whole number where it must be one.
OPERATIONS: dict[str, tuple[float, float, bool, bool]] = {
    # name: base, slope, random sign, whole number
    "autocontrast": (0.0, 0.0, False, False),
    "equalize": (0.0, 0.0, False, False),
    "invert": (0.0, 0.0, False, False),
    "rotate": (0.0, 30.0, True, False),  # degrees
    "posterize": (4.0, -4.0, False, True),  # bits that stay
    "solarize": (256.0, -256.0, False, True),  # values from here on are inverted
    "solarize_add": (0.0, 110.0, False, True),  # added to values below 128
    "color": (1.0, 0.9, True, False),  # factors
    "contrast": (1.0, 0.9, True, False),
    "brightness": (1.0, 0.9, True, False),
    "sharpness": (1.0, 0.9, True, False),
    "shear_x": (0.0, 0.3, True, False),  # pixels by pixel
    "shear_y": (0.0, 0.3, True, False),
    "translate_x": (0.0, 0.45, True, False),  # shares of the side
    "translate_y": (0.0, 0.45, True, False),
}
NAMES = tuple(OPERATIONS)
# Each operation of an image is left out with this probability, as in timm.
SKIPPED = 0.5
# What comes in from outside of the picture.
GREY = 128.0


def apply_operation(
    images: Float[Array, "B H W 3"],
    chosen: Int[Array, " B"],
    level: Float[Array, " B"],
    sign: Float[Array, " B"],
) -> Float[Array, "B H W 3"]:
    """One operation of RandAugment for each image.

    Args:
      images: on the scale 0 to 255.
      chosen: places in `NAMES`; -1 for none.
      level: 0 to 10.
      sign: 1 or -1, for operations that have two directions.
    """
    table = np.array([[*map(float, row)] for row in OPERATIONS.values()], np.float32)
    base, slope, signed, whole = jnp.asarray(table)[jnp.maximum(chosen, 0)].T
    part = slope * level / 10
    part = jnp.where(whole > 0, jnp.trunc(part), part) * jnp.where(signed > 0, sign, 1.0)
    setting = base + part

    def where(name: str, then: Any, otherwise: Any) -> Array:
        return jnp.where(chosen == NAMES.index(name), then, otherwise)

    images = _affine(images, where, setting)
    images = _look_up(jnp.round(images), where, setting)
    images = adjust_saturation(images, where("color", setting, 1.0))
    return _sharpened(images, where("sharpness", setting, 1.0))


def _affine(images: Array, where: Any, setting: Array) -> Array:
    """Rotations about the centre, shears about the upper left corner, and shifts."""
    height, width = images.shape[1:3]
    zero = jnp.zeros_like(setting)
    turn = where("rotate", jnp.deg2rad(setting), zero)
    shear_x, shear_y = where("shear_x", setting, zero), where("shear_y", setting, zero)
    shift_x = where("translate_x", setting * width, zero)
    shift_y = where("translate_y", setting * height, zero)
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
    cos, sin, shear_x, shear_y, shift_x, shift_y = (
        value[:, None, None] for value in (cos, sin, shear_x, shear_y, shift_x, shift_y)
    )
    dy, dx = y - height / 2, x - width / 2
    # Where each pixel comes from.
    from_x = cos * dx - sin * dy + width / 2 + shear_x * y + shift_x
    from_y = sin * dx + cos * dy + height / 2 + shear_y * x + shift_y
    return _sampled(images, from_y, from_x)


def _sampled(images: Array, y: Array, x: Array) -> Array:
    """Bilinear samples at places in pixels; grey outside."""
    height, width = images.shape[1:3]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = y - 0.5, x - 0.5
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    flat = images.reshape(images.shape[0], -1, 3)

    def corner(row: Array, col: Array) -> Array:
        row = jnp.clip(row, 0, height - 1).astype(int)
        col = jnp.clip(col, 0, width - 1).astype(int)
        place = (row * width + col).reshape(images.shape[0], -1, 1)
        return jnp.take_along_axis(flat, place, axis=1).reshape(images.shape)

    upper = corner(top, left) * (1 - right) + corner(top, left + 1) * right
    lower = corner(top + 1, left) * (1 - right) + corner(top + 1, left + 1) * right
    return jnp.where(inside[..., None], upper * (1 - down) + lower * down, GREY)


def _look_up(images: Array, where: Any, setting: Array) -> Array:
    """Operations that give each value of a channel another, by tables `[B, 3, 256]`."""
    values = jnp.arange(256.0)
    setting = setting[:, None]
    planes = jnp.moveaxis(images, -1, 1).reshape(images.shape[0], 3, -1).astype(int)
    # A scatter, which TPUs are slow at; only two of the operations need it. Not measured there.
    counts = jax.vmap(jax.vmap(lambda plane: jnp.bincount(plane, length=256)))(planes)
    mean = jnp.floor(jnp.mean(grey_of(images), axis=(1, 2)) + 0.5)[:, None]
    table = jnp.broadcast_to(values, (images.shape[0], 256))
    step = jnp.exp2(8 - setting)
    for name, then in (
        ("invert", 255 - values),
        ("posterize", jnp.floor(values / step) * step),
        ("solarize", jnp.where(values < setting, values, 255 - values)),
        ("solarize_add", jnp.where(values < 128, values + setting, values)),
        ("brightness", values * setting),
        ("contrast", mean + (values - mean) * setting),
    ):
        table = jnp.where(where(name, 1, 0)[:, None] > 0, then, table)
    tables = jnp.broadcast_to(table[:, None], (images.shape[0], 3, 256))
    for name, then in (("autocontrast", _stretching(counts)), ("equalize", _equalizing(counts))):
        tables = jnp.where(where(name, 1, 0)[:, None, None] > 0, then, tables)
    tables = jnp.clip(jnp.floor(tables), 0, 255)
    found = jnp.take_along_axis(tables, planes, axis=-1)
    return jnp.moveaxis(found.reshape(-1, 3, *images.shape[1:3]), 1, -1)


def _stretching(counts: Int[Array, "B 3 256"]) -> Float[Array, "B 3 256"]:
    """The darkest value becomes 0 and the lightest 255."""
    values = jnp.arange(256.0)
    low = jnp.argmax(counts > 0, axis=-1, keepdims=True).astype(jnp.float32)
    high = 255.0 - jnp.argmax(counts[..., ::-1] > 0, axis=-1, keepdims=True)
    stretched = (values - low) * 255 / jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, values)


def _equalizing(counts: Int[Array, "B 3 256"]) -> Float[Array, "B 3 256"]:
    """Every value as frequent as the others, in whole numbers as Pillow does it."""
    last = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=-1, keepdims=True)
    rest = jnp.sum(counts, axis=-1, keepdims=True) - jnp.take_along_axis(counts, last, axis=-1)
    step = rest // 255
    below = jnp.cumsum(counts, axis=-1) - counts
    equal = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, equal, jnp.arange(256)).astype(jnp.float32)


def grey_of(images: Float[Array, "*B 3"]) -> Float[Array, "*B"]:
    """Luma by ITU-R 601, rounded as Pillow's mode L."""
    return jnp.round(images @ jnp.array([0.299, 0.587, 0.114], jnp.float32))


def adjust_saturation(
    images: Float[Array, "B H W 3"], factor: Float[Array, " B"]
) -> Float[Array, "B H W 3"]:
    """Colours nearer to grey (below 1) or farther from it (above 1)."""
    grey = grey_of(images)[..., None]
    return jnp.clip(grey + (images - grey) * factor[:, None, None, None], 0, 255)


def _sharpened(images: Array, factor: Array) -> Array:
    """A blend with a smoothed copy; the border stays as it is."""
    inner = images[:, 1:-1, 1:-1]
    around = sum(
        images[:, 1 + dy : images.shape[1] - 1 + dy, 1 + dx : images.shape[2] - 1 + dx]
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    )
    smooth = images.at[:, 1:-1, 1:-1].set((around + 4 * inner) / 13)
    return jnp.clip(smooth + (images - smooth) * factor[:, None, None, None], 0, 255)


def adjust_hue(
    images: Float[Array, "B H W 3"], turns: Float[Array, " B"]
) -> Float[Array, "B H W 3"]:
    """Turns the hue of HSV and keeps saturation and value."""
    high, low = jnp.max(images, axis=-1), jnp.min(images, axis=-1)
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    span = high - low
    safe = jnp.where(span > 0, span, 1.0)
    # Not `high == red`: XLA may compute the two a last bit apart.
    sixth = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sixth[..., None] + 6 * turns[:, None, None, None]
    # Each channel falls from the highest value to the lowest as the hue goes away from it.
    distance = (hue + jnp.array([5.0, 3.0, 1.0])) % 6
    fall = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
    return jnp.where(span[..., None] > 0, high[..., None] - span[..., None] * fall, images)
