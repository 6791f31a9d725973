"""Figures by name, for those who choose before Matplotlib is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vit_interact.viz.image_data import ImageData

#: Stem of the PNG -> what the figure shows, for links and alternative texts.
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "received_impact": "received impact",
        "interaction": "interactions of the strongest patches",
        "windows": "adaptive windows",
        "field": "responsive field",
        "growth": "growth with depth",
        "removal": "removal of the least discriminative patches",
        "predicted": "predicted windows",
    }
)

#: Images on one contact sheet; more go on further sheets.
IMAGES_A_SHEET = 48


def sheets(first: Path, count: int) -> Iterator[tuple[Path, range]]:
    """Each contact sheet, and which of the images are on it.

    Args:
      first: the first sheet, such as `OUT/contact_sheet.png`; with more than `IMAGES_A_SHEET`
        images `contact_sheet_2.png` and so on follow.
      count: images.
    """
    for number, start in enumerate(range(0, count, IMAGES_A_SHEET), start=1):
        path = first if number == 1 else first.with_stem(f"{first.stem}_{number}")
        yield path, range(start, min(start + IMAGES_A_SHEET, count))


def applies(stem: str, data: ImageData) -> bool:
    """Whether a figure can be drawn: plain models predict no windows."""
    return stem != "predicted" or "predicted_window" in data
