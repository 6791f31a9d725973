"""What shapes do not tell about a checkpoint, and where each answer was taken from.

`gather_facts` asks, each answer overruling those before it: the convention of the file's family,
the file's metadata or `config.json`, `preprocessor_config.json`, and the caller's `arch`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vit_interact.models.config import ViTConfig, as_pair
from vit_interact.models.formats import GOOGLE, HF_CLIP, HF_DINOV2, HF_VIT, TIMM, Format
from vit_interact.models.sources import RawWeights, WeightsError

if TYPE_CHECKING:
    from vit_interact.data.preprocess import Preprocess

METADATA_KEY = "vit_interact"
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


def _convention(
    numbers: Mapping[str, Any], activation: str, norm_eps: float, method: str, interpolation: str,
    crop: str = "resize_then_center", crop_pct: float = 0.875,
) -> dict[str, Any]:  # fmt: skip
    return {
        **numbers, "activation": activation, "norm_eps": norm_eps, "position_method": method,
        "interpolation": interpolation, "crop": crop, "crop_pct": crop_pct,
    }  # fmt: skip


# Google's models are trained in JAX, whose default GELU is the tanh one. timm and Hugging Face
# run their conversions of the same weights with the erf one.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "augreg": _convention(_HALF, "gelu_tanh", 1e-6, "bilinear", "bilinear", "stretch", 1.0),
    "big_vision": _convention(_HALF, "gelu_tanh", 1e-6, "bilinear", "bilinear"),
    "timm ViT": _convention(_HALF, "gelu", 1e-6, "bicubic_antialias", "bicubic", crop_pct=0.9),
    "timm DeiT": _convention(_IMAGENET, "gelu", 1e-6, "bicubic_antialias", "bicubic", crop_pct=0.9),
    "timm DINOv2": _convention(
        _IMAGENET, "gelu", 1e-6, "bicubic_antialias", "bicubic", crop_pct=1.0
    ),
    "timm CLIP": _convention(_CLIP, "gelu", 1e-5, "bicubic_antialias", "bicubic", crop_pct=1.0),
    "Hugging Face ViT": _convention(
        _HALF, "gelu", 1e-12, "bicubic", "bilinear", "stretch", 1.0
    ),
    "Hugging Face DeiT": _convention(_IMAGENET, "gelu", 1e-12, "bicubic", "bicubic"),
    "Hugging Face DINOv2": _convention(_IMAGENET, "gelu", 1e-6, "bicubic", "bicubic"),
    "Hugging Face DINOv2 with registers": _convention(
        _IMAGENET, "gelu", 1e-6, "bicubic_antialias", "bicubic"
    ),
    "Hugging Face CLIP": _convention(
        _CLIP, "gelu_quick", 1e-5, "bicubic", "bicubic", crop_pct=1.0
    ),
}  # fmt: skip

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "quickgelu": "gelu_quick",
    "gelu_quick": "gelu_quick",
}
_TIMM_POOLS = {"token": "cls", "avg": "gap", "map": "map"}
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class Facts:
    """Answers with their sources; a later answer overrules an earlier one.

    Attributes:
      values: what is known, such as `heads`, `activation`, `image_size`, `mean`.
      sources: for each of them, who said so.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def say(self, source: str, **values: Any) -> None:
        """Records answers; None is no answer."""
        for key, value in values.items():
            if value is not None:
                self.values[key] = value
                self.sources[key] = source

    def get(self, key: str, default: Any = None) -> Any:
        """The answer, or `default`."""
        return self.values.get(key, default)

    def notes(self) -> list[str]:
        """One line for each source, with what was taken from it."""
        lines: dict[str, list[str]] = {}
        for key, source in self.sources.items():
            if key not in ("class_names", "config"):
                lines.setdefault(source, []).append(f"{key}={self.values[key]}")
        return [f"from {source}: {', '.join(values)}" for source, values in lines.items()]


def family(form: Format, names: Iterable[str], architecture: str) -> str:
    """The key of `CONVENTIONS` that fits a format, its names and an architecture's name."""
    names, architecture = set(names), architecture.lower()
    if form is GOOGLE:
        return "augreg" if any("posembed_input" in name for name in names) else "big_vision"
    if form is HF_CLIP:
        return "Hugging Face CLIP"
    if form is HF_DINOV2:
        registers = "embeddings.register_tokens" in names
        return "Hugging Face DINOv2" + (" with registers" if registers else "")
    library = "timm" if form is TIMM else "Hugging Face"
    distilled = names & {"dist_token", "embeddings.distillation_token"}
    if "deit" in architecture or distilled:
        return f"{library} DeiT"
    if form is HF_VIT:
        return "Hugging Face ViT"
    if "clip" in architecture or "norm_pre.weight" in names:
        return "timm CLIP"
    scaled = "blocks.0.ls1.gamma" in names and not architecture
    return "timm DINOv2" if "dinov2" in architecture or scaled else "timm ViT"


def gather_facts(
    form: Format, names: Iterable[str], raw: RawWeights, arch: str | ViTConfig | None
) -> Facts:
    """Everything that is said about a checkpoint apart from its shapes.

    Args:
      form: its format.
      names: its names, as in the file and as the table spells them.
      raw: its files.
      arch: the caller's word.

    Raises:
      WeightsError: for a config that asks for what the model cannot do.
    """
    facts = Facts()
    spoken = arch if isinstance(arch, str) else ""
    written = str(raw.config.get("architecture") or raw.metadata.get("architecture") or "")
    if not written and raw.config.get("model_type") == "deit":
        written = "deit"
    chosen = family(form, names, spoken or written)
    facts.say(f"the convention of {chosen} files", **CONVENTIONS[chosen])
    if "quickgelu" in written:
        facts.say("the architecture's name", activation="gelu_quick")
    _hear_metadata(facts, raw.metadata)
    if form is TIMM:
        _hear_timm(facts, raw.config)
    else:
        _hear_hugging_face(facts, raw.config)
    _hear_preprocessor(facts, raw.preprocessor)
    if isinstance(arch, ViTConfig):
        facts.say("arch=", config=arch)
    elif arch is not None:
        from vit_interact.models.zoo import model_config

        config = model_config(arch)
        facts.say(f"arch={arch!r}", heads=config.heads)
        if arch.startswith("clip"):
            facts.say(f"arch={arch!r}", activation=config.activation, norm_eps=config.norm_eps)
    return facts


def _hear_metadata(facts: Facts, metadata: Mapping[str, str]) -> None:
    """Our own export's record, or the plain entries of the embedded weights."""
    source = "the file's metadata"
    if METADATA_KEY in metadata:
        try:
            record = json.loads(metadata[METADATA_KEY])
            facts.say(source, config=ViTConfig.from_dict(record["config"]))
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"the file's own record of its model cannot be read ({error}); another version of "
                "this package may have written it"
            ) from error
        facts.say(source, class_names=record.get("class_names"))
        facts.say(source, preprocess=record.get("preprocess"))
        return
    for key in ("mean", "std"):
        if key in metadata:
            facts.say(source, **{key: tuple(float(x) for x in metadata[key].split(","))})
    facts.say(source, interpolation=metadata.get("interpolation"))
    if "center square" in metadata.get("crop", ""):
        facts.say(source, crop="center_then_resize", crop_pct=1.0)
    if "image_size" in metadata:
        facts.say(source, image_size=_size(metadata["image_size"]))
    if "position_grid" in metadata:
        facts.say(source, grid=_size(metadata["position_grid"]))
    if "classes" in metadata:
        facts.say(source, class_names=metadata["classes"].split("|"))


def _size(text: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.split(r"[,x]", text)]
    return as_pair(numbers[0] if len(numbers) == 1 else tuple(numbers), "image_size")


def _activation(name: Any) -> str | None:
    if name is None:
        return None
    if name not in _ACTIVATIONS:
        raise WeightsError(
            f"config.json asks for the activation {name!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _hear_timm(facts: Facts, config: Mapping[str, Any]) -> None:
    picture, model = config.get("pretrained_cfg") or config, config.get("model_args") or {}
    size = model.get("img_size") or (picture.get("input_size") or [None])[1:]
    facts.say(
        "config.json",
        heads=model.get("num_heads"),
        activation=_activation(model.get("act_layer")),
        pool=_TIMM_POOLS.get(str(model.get("global_pool") or config.get("global_pool"))),
        image_size=as_pair(size, "img_size") if size else None,
        mean=_numbers(picture.get("mean")),
        std=_numbers(picture.get("std")),
        interpolation=_known(picture.get("interpolation")),
        crop_pct=picture.get("crop_pct"),
        crop="stretch" if picture.get("crop_mode") == "squash" else None,
        class_names=config.get("label_names") or picture.get("label_names"),
    )


def _known(interpolation: Any) -> str | None:
    """The interpolation, unless it is timm's `random`, which says nothing of inference."""
    return interpolation if interpolation in _PIL_FILTERS.values() else None


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _hear_hugging_face(facts: Facts, config: Mapping[str, Any]) -> None:
    vision = config.get("vision_config", config)
    size = vision.get("image_size")
    labels = config.get("id2label") or {}
    names = [str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    placeholders = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    facts.say(
        "config.json",
        heads=vision.get("num_attention_heads"),
        activation=_activation(vision.get("hidden_act")),
        norm_eps=vision.get("layer_norm_eps"),
        image_size=None if size is None else as_pair(size, "image_size"),
        layer_scale=vision.get("layerscale_value"),
        class_names=None if placeholders else names,
    )


def _hear_preprocessor(facts: Facts, config: Mapping[str, Any]) -> None:
    source = "preprocessor_config.json"
    facts.say(source, mean=_numbers(config.get("image_mean")))
    facts.say(source, std=_numbers(config.get("image_std")))
    facts.say(source, interpolation=_PIL_FILTERS.get(config.get("resample", -1)))
    size = config.get("size")
    if size is None:
        return
    sides = list(size.values()) if isinstance(size, dict) else [size]
    if config.get("do_center_crop"):
        crop = config.get("crop_size") or size
        edge = min(crop.values()) if isinstance(crop, dict) else crop
        facts.say(source, crop="resize_then_center", crop_pct=min(1.0, edge / min(sides)))
        facts.say(source, crop_size=edge)
    elif isinstance(size, dict) and "shortest_edge" in size:
        facts.say(source, crop="resize_then_center", crop_pct=1.0)
    else:
        facts.say(source, crop="stretch", crop_pct=1.0)


def make_preprocess(facts: Facts, image_size: tuple[int, int]) -> Preprocess:
    """What to do to pictures before the model reads them at `image_size` (height, width)."""
    from vit_interact.data.preprocess import Preprocess

    stored = facts.get("preprocess")
    if stored is not None:
        return dataclasses.replace(Preprocess.from_dict(stored), size=image_size)
    keys = ("mean", "std", "interpolation", "crop", "crop_pct")
    return Preprocess(size=image_size, **{key: facts.get(key) for key in keys})
