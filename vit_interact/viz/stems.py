"""The figures of one image by name, for those who choose before Matplotlib is there."""

from __future__ import annotations

from collections.abc import Mapping
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


def applies(stem: str, data: ImageData) -> bool:
    """Whether a figure can be drawn: plain models predict no windows."""
    return stem != "predicted" or "predicted_window" in data
