"""How a photograph becomes what a model was trained on: crop, size, interpolation, mean, std."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
from PIL import Image

Pixels = TypeVar("Pixels")

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
CROPS = ("center_then_resize", "resize_then_center", "stretch")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Preprocessing that belongs to weights.

    Attributes:
      size: (height, width) in pixels.
      mean: of each channel, on the scale 0 to 1.
      std: of each channel, on the scale 0 to 1.
      interpolation: one of `INTERPOLATIONS`, by Pillow (antialiased).
      crop: `center_then_resize` takes the largest centred rectangle of the target's aspect and
        resizes it; `resize_then_center` resizes the shorter side to size / crop_pct and takes the
        centre, as timm and torchvision do; `stretch` resizes without regard to aspect.
      crop_pct: share of the resized image that `resize_then_center` keeps.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop: str = "resize_then_center"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("interpolation", tuple(INTERPOLATIONS)), ("crop", CROPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {known}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct}: expected a share in (0, 1]")
        if min(self.size) < 1 or min(self.std) <= 0:
            raise ValueError(f"size={self.size} and std={self.std} must be positive")

    def picture(self, image: Image.Image) -> np.ndarray:
        """Crops and resizes.

        Args:
          image: an RGB image, as `read_image` returns.

        Returns:
          uint8 `[h, w, 3]`: what the model sees, before normalisation.
        """
        height, width = self.size
        resample = INTERPOLATIONS[self.interpolation]
        box = None
        if self.crop == "resize_then_center":
            # Resized whole, a long strip would take gigabytes for ends that the crop drops.
            longest = (
                64 * max(1, round(image.height * width / height)),
                64 * max(1, round(image.width * height / width)),
            )
            left, top = (
                max(0, side - most) // 2 for side, most in zip(image.size, longest, strict=True)
            )
            if left or top:
                image = image.crop((left, top, image.width - left, image.height - top))
            scale = max(height / image.height, width / image.width) / self.crop_pct
            resized = (
                max(width, round(image.width * scale)),
                max(height, round(image.height * scale)),
            )
            image = image.resize(resized, resample)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            return np.asarray(image.crop((left, top, left + width, top + height)))
        if self.crop == "center_then_resize":
            # Rounded to whole pixels: a crop before a resize, not one fractional step.
            scale = min(image.height / height, image.width / width)
            ch, cw = max(1, round(height * scale)), max(1, round(width * scale))
            left, top = (image.width - cw) // 2, (image.height - ch) // 2
            box = (left, top, left + cw, top + ch)
        return np.asarray(image.resize((width, height), resample, box=box))

    def normalize(self, pixels: Pixels) -> Pixels:
        """`(pixels / 255 − mean) / std` in float32 for uint8 `[..., h, w, 3]`, NumPy or JAX."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std  # type: ignore[attr-defined]

    def describe(self) -> str:
        """One line for people."""
        height, width = self.size
        how = {
            "center_then_resize": "centre crop, then resize",
            "resize_then_center": f"resize, then centre crop of {self.crop_pct:g}",
            "stretch": "stretch",
        }[self.crop]
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return f"{how} to {height}x{width}, {self.interpolation}; mean {mean}; std {std}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields, the inverse of `from_dict`."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocess:
        """Builds preprocessing from `to_dict`'s output."""
        tuples: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**tuples)
