"""Augmentation on the device: whole batches inside `jit`, every image with draws of its own.

A crop, its resizing and the flip are one pair of matrix products an image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vit_interact.data.operations import (
    GREY,
    NAMES,
    SKIPPED,
    adjust_hue,
    adjust_saturation,
    apply_operation,
    grey_of,
)

TRIES = 10
ERASED = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 3.3)


@dataclasses.dataclass(frozen=True)
class Augment:
    """What to do to training images. Hashable, so that it can be static under `jit`.

    Attributes:
      crop: shares of the area that a random resized crop takes; None for the whole picture.
      ratio: width by height of the crop, in the original photograph.
      flip: left for right with probability ½.
      pad: without crops: shift by up to so many pixels each way, grey coming in.
      rand_augment: operations for each image, each left out with probability ½.
      magnitude: mean level of RandAugment, 0 to 10.
      magnitude_std: its standard deviation over images.
      brightness: factors of colour jitter lie within 1 ± this, not below 0; so for the next two.
      contrast: of the distance to the mean grey value.
      saturation: of the distance to grey.
      hue: shift of the hue, up to this many turns either way.
      erase: probability that a rectangle is replaced by noise.
      mixup: alpha of the Beta distribution; 0 for none.
      cutmix: alpha; where mixup is on, too, every batch gets one of the two.
    """

    crop: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    pad: int = 0
    rand_augment: int = 0
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"augment.crop={self.crop}: expected (low, high) within (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio={self.ratio}: expected (low, high), both positive")
        if self.crop is not None and self.pad:
            raise ValueError("augment.pad shifts whole pictures: set augment.crop=() for it")
        for name, most in (("magnitude", 10), ("hue", 0.5), ("erase", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"augment.{name}={getattr(self, name)}: expected 0 to {most}")
        for name in (
            "pad", "rand_augment", "magnitude_std", "brightness", "contrast", "saturation",
            "mixup", "cutmix",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name}={getattr(self, name)}: expected at least 0")


def augment_images(
    key: Array,
    pictures: UInt8[Array, "B h w 3"],
    sizes: Int[Array, "B 2"],
    plan: Augment,
    size: tuple[int, int],
) -> Float[Array, "B H W 3"]:
    """Crops, flips and changes colours.

    Args:
      key: random key.
      pictures: whole photographs, stretched to one size.
      sizes: (height, width) of the originals, which give crops their true aspect.
      plan: what to do; erasing and mixing are done by the functions below.
      size: (height, width) that the model reads.

    Returns:
      float32 on the scale 0 to 255.
    """
    keys = jax.random.split(key, 5)
    count, (height, width) = pictures.shape[0], pictures.shape[1:3]
    if plan.crop is None:
        box = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (count, 4))
    else:
        box = _boxes(keys[0], sizes, plan)
    flips = jax.random.bernoulli(keys[1], 0.5, (count,)) & plan.flip
    rows = resampling(box[:, 0] * height, box[:, 2] * height, height, size[0])
    cols = resampling(box[:, 1] * width, box[:, 3] * width, width, size[1])
    cols = jnp.where(flips[:, None, None], cols[:, ::-1], cols)
    images = jnp.einsum("bij,bjwc->biwc", rows, pictures.astype(jnp.float32))
    images = jnp.einsum("bkw,biwc->bikc", cols, images)
    if plan.pad:
        images = _shifted(keys[2], images, plan.pad)
    for step in range(plan.rand_augment):
        images = _random_operation(jax.random.fold_in(keys[3], step), images, plan)
    return _jittered(keys[4], images, plan)


def _boxes(key: Array, sizes: Int[Array, "B 2"], plan: Augment) -> Float[Array, "B 4"]:
    """Random crops (top, left, bottom, right) as shares of the sides.

    Of ten draws the first that fits is taken; otherwise the largest centred box whose aspect is
    allowed, as torchvision's RandomResizedCrop does it.
    """
    assert plan.crop is not None
    keys = jax.random.split(key, 4)
    height, width = (sizes[:, axis, None].astype(jnp.float32) for axis in (0, 1))
    shape = (sizes.shape[0], TRIES)
    area = (
        height
        * width
        * jax.random.uniform(keys[0], shape, minval=plan.crop[0], maxval=plan.crop[1])
    )
    low, high = np.log(plan.ratio)
    ratio = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
    cols, rows = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (cols > 0) & (cols <= width) & (rows > 0) & (rows <= height)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    cols, rows = (jnp.take_along_axis(side, first, axis=1) for side in (cols, rows))
    # Whole pixels of the original, each place as likely.
    shape = (sizes.shape[0], 1)
    top = jnp.floor(jax.random.uniform(keys[2], shape) * (height - rows + 1))
    left = jnp.floor(jax.random.uniform(keys[3], shape) * (width - cols + 1))
    aspect = width / height
    central_cols = jnp.where(aspect > plan.ratio[1], jnp.round(height * plan.ratio[1]), width)
    central_rows = jnp.where(aspect < plan.ratio[0], jnp.round(width / plan.ratio[0]), height)
    found = jnp.any(fits, axis=1, keepdims=True)
    rows, cols = jnp.where(found, rows, central_rows), jnp.where(found, cols, central_cols)
    top = jnp.where(found, top, jnp.floor((height - rows) / 2))
    left = jnp.where(found, left, jnp.floor((width - cols) / 2))
    sides = [top / height, left / width, (top + rows) / height, (left + cols) / width]
    return jnp.concatenate(sides, axis=1)


def resampling(
    start: Float[Array, " B"], end: Float[Array, " B"], old: int, new: int
) -> Float[Array, "B new old"]:
    """Matrices that resize the stretch from `start` to `end` of `old` pixels to `new` pixels.

    Pillow's antialiased bilinear filter: a triangle, widened where pixels become fewer, cut off and
    renormalised at the border of the picture (not of the stretch).
    """
    scale = ((end - start) / new)[:, None, None]
    reach = jnp.maximum(scale, 1.0)
    centres = start[:, None, None] + (jnp.arange(new)[:, None] + 0.5) * scale
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(jnp.arange(old) + 0.5 - centres) / reach)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _shifted(key: Array, images: Array, pad: int) -> Array:
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=GREY)
    shape = images.shape[1:]

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)

    return jax.vmap(cut)(padded, offsets)


def _random_operation(key: Array, images: Array, plan: Augment) -> Array:
    keys = jax.random.split(key, 4)
    count = (images.shape[0],)
    chosen = jax.random.randint(keys[0], count, 0, len(NAMES))
    chosen = jnp.where(jax.random.bernoulli(keys[1], SKIPPED, count), -1, chosen)
    level = plan.magnitude + plan.magnitude_std * jax.random.normal(keys[2], count)
    sign = jax.random.rademacher(keys[3], count).astype(jnp.float32)
    return apply_operation(images, chosen, jnp.clip(level, 0, 10), sign)


def _jittered(key: Array, images: Array, plan: Augment) -> Array:
    """Brightness, contrast, saturation and hue, in this order."""
    keys = jax.random.split(key, 4)

    def factor(key: Array, spread: float) -> Array:
        shape, low = (images.shape[0], 1, 1, 1), max(0.0, 1 - spread)
        return jax.random.uniform(key, shape, minval=low, maxval=1 + spread)

    if plan.brightness:
        images = jnp.clip(images * factor(keys[0], plan.brightness), 0, 255)
    if plan.contrast:
        mean = jnp.mean(grey_of(images), axis=(1, 2))[:, None, None, None]
        images = jnp.clip(mean + (images - mean) * factor(keys[1], plan.contrast), 0, 255)
    if plan.saturation:
        images = adjust_saturation(images, factor(keys[2], plan.saturation)[:, 0, 0, 0])
    if plan.hue:
        shape = (images.shape[0],)
        images = adjust_hue(
            images, jax.random.uniform(keys[3], shape, minval=-plan.hue, maxval=plan.hue)
        )
    return images


def erase_images(
    key: Array, images: Float[Array, "B H W 3"], plan: Augment
) -> Float[Array, "B H W 3"]:
    """Replaces a rectangle by normal noise in some images (Zhong et al. 2020).

    Args:
      key: random key.
      images: normalised.
      plan: `plan.erase` is the probability.
    """
    if not plan.erase:
        return images
    keys = jax.random.split(key, 6)
    count, height, width = images.shape[:3]
    area = (
        height * width * jax.random.uniform(keys[0], (count,), minval=ERASED[0], maxval=ERASED[1])
    )
    low, high = np.log(ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(keys[1], (count,), minval=low, maxval=high))
    rows = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, height)
    cols = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, width)
    top = jnp.floor(jax.random.uniform(keys[2], (count,)) * (height - rows + 1))
    left = jnp.floor(jax.random.uniform(keys[3], (count,)) * (width - cols + 1))
    chosen = jax.random.bernoulli(keys[4], plan.erase, (count,))
    inside = _inside(top, left, top + rows, left + cols, height, width)
    noise = jax.random.normal(keys[5], images.shape, images.dtype)
    return jnp.where((inside & chosen[:, None, None])[..., None], noise, images)


def _inside(top: Array, left: Array, bottom: Array, right: Array, height: int, width: int) -> Array:
    """Which pixels are in a box: `[..., height, width]`."""
    y, x = jnp.arange(height), jnp.arange(width)
    rows = (y >= top[..., None]) & (y < bottom[..., None])
    cols = (x >= left[..., None]) & (x < right[..., None])
    return rows[..., :, None] & cols[..., None, :]


def mix_images(
    key: Array, images: Float[Array, "B H W 3"], targets: Float[Array, "B C"], plan: Augment
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B C"]]:
    """Mixes every image with one other of the batch, and their targets alike.

    Args:
      key: random key.
      images: normalised.
      targets: of each image.
      plan: `mixup` (Zhang et al. 2018) blends, `cutmix` (Yun et al. 2019) pastes a rectangle; one
        share of the partner for the whole batch.
    """
    if not (plan.mixup or plan.cutmix):
        return images, targets
    keys = jax.random.split(key, 4)
    # The neighbour: of a batch on many devices, only one image of each travels.
    partner, theirs = jnp.roll(images, 1, axis=0), jnp.roll(targets, 1, axis=0)
    height, width = images.shape[1:3]
    both = plan.mixup > 0 and plan.cutmix > 0
    pastes = jax.random.bernoulli(keys[0]) if both else jnp.asarray(plan.cutmix > 0)
    alpha = jnp.where(pastes, plan.cutmix or 1.0, plan.mixup or 1.0)
    own = jax.random.beta(keys[1], alpha, alpha)
    # The box is cut off at the border, so its true area decides the share.
    rows, cols = (jnp.round(side * jnp.sqrt(1 - own)) for side in (height, width))
    middle = jnp.floor(jax.random.uniform(keys[2], (2,)) * jnp.array([height, width]))
    top, left = jnp.floor(middle[0] - rows / 2), jnp.floor(middle[1] - cols / 2)
    box = _inside(top, left, top + rows, left + cols, height, width)
    own = jnp.where(pastes, 1 - jnp.mean(box.astype(jnp.float32)), own)
    blend = own.astype(images.dtype)
    pasted = jnp.where(box[..., None], partner, images)
    images = jnp.where(pastes, pasted, images * blend + partner * (1 - blend))
    return images, (targets * own + theirs * (1 - own)).astype(targets.dtype)
