"""The transforms of `augment.py` for one picture at a time, by Pillow, where the device is a CPU.

What is drawn has the same distribution; the draws themselves differ.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from vit_interact.data.augment import TRIES, Augment
from vit_interact.data.operations import GREY, NAMES, OPERATIONS, SKIPPED

_FILL = (int(GREY),) * 3
_ENHANCE = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def augment_picture(
    generator: np.random.Generator, image: Image.Image, plan: Augment, size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Crops, flips and changes colours.

    Args:
      generator: of all that is random.
      image: the photograph, RGB.
      plan: what to do; erasing and mixing follow on the device.
      size: (height, width) that the model reads.
    """
    height, width = size
    box = None if plan.crop is None else _box(generator, image, plan)
    if box is not None or image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if plan.flip and generator.random() < 0.5:
        image = ImageOps.mirror(image)
    if plan.pad:
        image = _shift(image, *generator.integers(-plan.pad, plan.pad + 1, 2).tolist())
    for _ in range(plan.rand_augment):
        name = NAMES[generator.integers(len(NAMES))]
        level = plan.magnitude + plan.magnitude_std * generator.standard_normal()
        sign = generator.choice((-1.0, 1.0))
        if generator.random() >= SKIPPED:
            image = apply_operation(image, name, float(np.clip(level, 0, 10)), float(sign))
    return np.asarray(_jitter(generator, image, plan))


def _box(
    generator: np.random.Generator, image: Image.Image, plan: Augment
) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom) in pixels; see `augment._boxes`."""
    assert plan.crop is not None
    low, high = np.log(plan.ratio)
    for _ in range(TRIES):
        area = image.width * image.height * generator.uniform(*plan.crop)
        ratio = math.exp(generator.uniform(low, high))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(generator.integers(image.width - width + 1))
            top = int(generator.integers(image.height - height + 1))
            return left, top, left + width, top + height
    aspect = image.width / image.height
    width = round(image.height * plan.ratio[1]) if aspect > plan.ratio[1] else image.width
    height = round(image.width / plan.ratio[0]) if aspect < plan.ratio[0] else image.height
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return left, top, left + width, top + height


def _shift(image: Image.Image, down: int, right: int) -> Image.Image:
    shifted = Image.new("RGB", image.size, _FILL)
    shifted.paste(image, (right, down))
    return shifted


def apply_operation(image: Image.Image, name: str, level: float, sign: float) -> Image.Image:
    """One operation of RandAugment.

    Args:
      image: RGB.
      name: of `operations.OPERATIONS`.
      level: 0 to 10.
      sign: 1 or -1, for operations that have two directions.
    """
    base, slope, signed, whole = OPERATIONS[name]
    part = slope * level / 10
    setting = base + (math.trunc(part) if whole else part) * (sign if signed else 1)
    if name in _ENHANCE:
        return _ENHANCE[name](image).enhance(setting)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "invert":
        return ImageOps.invert(image)
    if name == "posterize":
        step = 2 ** (8 - int(setting))
        return image.point([value // step * step for value in range(256)] * 3)
    if name == "solarize":
        return ImageOps.solarize(image, int(setting))
    if name == "solarize_add":
        added = [min(255, v + int(setting)) if v < 128 else v for v in range(256)]
        return image.point(added * 3)
    if name == "rotate":
        return image.rotate(setting, Image.Resampling.BILINEAR, fillcolor=_FILL)
    matrix = {
        "shear_x": (1, setting, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, setting, 1, 0),
        "translate_x": (1, 0, setting * image.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, setting * image.height),
    }[name]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _jitter(generator: np.random.Generator, image: Image.Image, plan: Augment) -> Image.Image:
    for name, spread in (
        ("brightness", plan.brightness), ("contrast", plan.contrast), ("color", plan.saturation)
    ):  # fmt: skip
        if spread:
            factor = generator.uniform(max(0.0, 1 - spread), 1 + spread)
            image = _ENHANCE[name](image).enhance(factor)
    return adjust_hue(image, generator.uniform(-plan.hue, plan.hue)) if plan.hue else image


def adjust_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turns the hue, in 256 steps."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(v + round(turns * 256)) % 256 for v in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
