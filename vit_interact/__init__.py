"""Patch interactions in Vision Transformers: measure, check, draw and train with them.

Names are imported on first use, so that `import vit_interact` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_HOMES = {
    "TokenLayout": "vit_interact.layout",
    "ViTConfig": "vit_interact.models.config",
    "ViT": "vit_interact.models.vit",
    "create_model": "vit_interact.models.zoo",
    "list_models": "vit_interact.models.zoo",
    "attention_fn": "vit_interact.models.attention",
    "Checkpoint": "vit_interact.models.weights",
    "load_checkpoint": "vit_interact.models.weights",
    "load_model": "vit_interact.models.weights",
    "export_timm": "vit_interact.models.weights",
    "measure": "vit_interact.observe.measure",
    "capture": "vit_interact.observe.measure",
    "ablate_edges": "vit_interact.observe.ablation",
    "analyze": "vit_interact.observe.analyze",
    "analyze_files": "vit_interact.observe.files",
    "show": "vit_interact.viz.widget",
    "sample_images": "vit_interact.data.samples",
    "interactions": "vit_interact",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from vit_interact import interactions
    from vit_interact.data.samples import sample_images
    from vit_interact.layout import TokenLayout
    from vit_interact.models.attention import attention_fn
    from vit_interact.models.config import ViTConfig
    from vit_interact.models.vit import ViT
    from vit_interact.models.weights import Checkpoint, export_timm, load_checkpoint, load_model
    from vit_interact.models.zoo import create_model, list_models
    from vit_interact.observe.ablation import ablate_edges
    from vit_interact.observe.analyze import analyze
    from vit_interact.observe.files import analyze_files
    from vit_interact.observe.measure import capture, measure
    from vit_interact.viz.widget import show


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vit_interact' has no attribute {name!r}")
    if name == "interactions":
        value = importlib.import_module("vit_interact.interactions")
    else:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
