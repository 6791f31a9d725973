"""What a run starts from: random weights, another run's, or anyone's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from vit_interact.data.preprocess import Preprocess
from vit_interact.models.config import as_pair
from vit_interact.models.vit import ViT
from vit_interact.models.weights import Checkpoint, load_checkpoint
from vit_interact.models.zoo import create_model
from vit_interact.train.checkpoint import FOLDER
from vit_interact.train.step import Teacher


class Start(NamedTuple):
    """A model before its first step.

    Attributes:
      model: the architecture.
      params: its parameters, or None to draw them.
      preprocess: of evaluation, and the normalisation of training.
      lines: what to tell people.
    """

    model: ViT
    params: dict[str, Any] | None
    preprocess: Preprocess
    lines: tuple[str, ...]


def choose_start(config: Any, class_names: tuple[str, ...]) -> Start:
    """Model, parameters and preprocessing as the config says.

    Args:
      config: the whole config.
      class_names: of the training data.

    Raises:
      ValueError: for settings that no model has, or weights that cannot be loaded.
    """
    size = as_pair(tuple(config.model.image_size), "config.model.image_size")
    settings = {**_plain(config.model.fields), "dtype": config.model.dtype}
    if not config.init:
        model = create_model(
            config.model.name, num_classes=len(class_names), image_size=size, **settings
        )
        lines: tuple[str, ...] = (f"{config.model.name} from random weights",)
        return Start(model, None, _preprocess(config, Preprocess(size=size)), lines)
    found = _load(config, size, class_names, settings)
    lines = (f"{found.source}: {found.model.config.count_parameters() / 1e6:.1f} M parameters",)
    return Start(
        found.model,
        found.params,
        _preprocess(config, found.preprocess),
        (*lines, *(f"  {note}" for note in found.notes)),
    )


def _load(
    config: Any, size: tuple[int, int], class_names: tuple[str, ...], settings: dict[str, Any]
) -> Checkpoint:
    source = config.init
    if (Path(source) / FOLDER).is_dir() and not (Path(source) / "model.safetensors").exists():
        raise ValueError(
            f"{source} is a run that has not been evaluated or finished yet: it has no "
            "model.safetensors to start from"
        )
    settings = {**settings, "image_size": size, "arch": config.model.name or None}
    classes = len(class_names)
    found = load_checkpoint(source, **settings)
    same = found.model.config.has_classes and found.model.config.num_classes == classes
    if same and found.class_names in (None, class_names):
        return found
    if not found.model.config.head_bias:
        settings["head_bias"] = True
    return load_checkpoint(source, drop_head=True, num_classes=classes, **settings)


def _plain(fields: Any) -> dict[str, Any]:
    """Fields of ViTConfig that are given; ConfigDict's lists are tuples there."""
    given = {name: value for name, value in fields.items() if value is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _preprocess(config: Any, found: Preprocess) -> Preprocess:
    """Preprocessing of the weights, with what the config says otherwise."""
    data = config.data
    changes: dict[str, Any] = {
        name: tuple(float(value) for value in data[name]) for name in ("mean", "std") if data[name]
    }
    for name in ("crop", "crop_pct", "interpolation"):
        if data[name]:
            changes[name] = data[name]
    return dataclasses.replace(found, **changes)


def load_teacher(config: Any, model: ViT, class_names: tuple[str, ...]) -> Teacher | None:
    """The teacher of `config.distill`, or None.

    Raises:
      ValueError: when it has other classes.
    """
    distill = config.distill
    if not distill.teacher:
        return None
    found = load_checkpoint(
        distill.teacher, image_size=model.config.image_size, dtype=config.model.dtype
    )
    classes = found.model.config.num_classes
    if classes != len(class_names) or found.class_names not in (None, class_names):
        raise ValueError(
            f"config.distill.teacher={distill.teacher} has {classes} classes of its own; expected "
            f"the {len(class_names)} of the training data"
        )
    return Teacher(
        found.model, found.params, found.preprocess, distill.kind, distill.weight,
        distill.temperature,
    )  # fmt: skip
