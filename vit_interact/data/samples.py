"""The weights and photographs that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

SAMPLE_MODEL = "vit_s14_caltech101"


class SampleImage(NamedTuple):
    """A photograph of Caltech-101 (CC BY 4.0; see `assets/README.md`).

    Attributes:
      path: the JPEG file.
      label: its class name.
    """

    path: Path
    label: str


def sample_images(limit: int | None = None) -> list[SampleImage]:
    """The embedded test photographs, two of each of 101 classes, sorted by class and name.

    Args:
      limit: return only so many, spread evenly over the classes.

    Raises:
      FileNotFoundError: when the package was installed without its data.
    """
    files = sorted(_asset("caltech101").glob("*/*.jpg"))
    samples = [SampleImage(path, path.parent.name) for path in files]
    if limit is None or limit >= len(samples):
        return samples
    if limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1")
    return [samples[i * len(samples) // limit] for i in range(limit)]


def sample_weights() -> Path:
    """The embedded weights: ViT-S/14 fine-tuned on Caltech-101, float16, timm names.

    Raises:
      FileNotFoundError: when the package was installed without its data.
    """
    return _asset(f"{SAMPLE_MODEL}.safetensors")


def _asset(name: str) -> Path:
    path = Path(str(resources.files("vit_interact"))) / "assets" / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: this installation lacks the package's data; install it again from "
            "a wheel or a clone of the repository"
        )
    return path
