"""Pretrained weights in and out.

`load_checkpoint` reads any format of `formats.py`: it finds the files (`sources.py`), asks what
shapes do not tell (`conventions.py`), reads the architecture from the shapes (`architecture.py`),
checks every parameter, and resizes the position embedding (`posembed.py`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from vit_interact.models import architecture, cpu
from vit_interact.models.config import ViTConfig, as_pair
from vit_interact.models.conventions import METADATA_KEY, Facts, gather_facts, make_preprocess
from vit_interact.models.formats import (
    FORMATS,
    TIMM,
    Arrays,
    Format,
    canonical,
    find_format,
    is_ignored,
    read_names,
    write_names,
)
from vit_interact.models.posembed import resize_position_embedding
from vit_interact.models.sources import RawWeights, WeightsError, open_source
from vit_interact.models.vit import ViT

if TYPE_CHECKING:
    from vit_interact.data.preprocess import Preprocess

__all__ = [
    "Checkpoint",
    "WeightsError",
    "export_timm",
    "load_checkpoint",
    "load_model",
    "stack_layers",
    "unstack_layers",
]

_LOGGER = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A model with everything that came with its weights.

    Attributes:
      model: the architecture.
      params: its parameters, float32.
      preprocess: what to do to pictures first.
      class_names: names of the outputs, when known.
      source: what was loaded, as the caller wrote it.
      sha256: of the weights file, or of all its shards in name order.
      notes: lines that say what shapes did not tell and where it was taken from instead.
    """

    model: ViT
    params: dict[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...] | None
    source: str
    sha256: str
    notes: tuple[str, ...]

    def load_images(self, paths: Iterable[str | pathlib.Path]) -> Float[np.ndarray, "B h w 3"]:
        """Reads image files as the model wants them.

        Args:
          paths: image files.

        Returns:
          Cropped, resized and normalised, float32 `[B, h, w, 3]`.

        Raises:
          ImageError: for a file that cannot be read, naming it.
        """
        from vit_interact.data.images import read_image

        pictures = [self.preprocess.picture(read_image(path)) for path in paths]
        return self.preprocess.normalize(np.stack(pictures))

    def for_few(self, images: int) -> Checkpoint:
        """The same with one block looped by `nn.scan`, where programs take longer to make than run.

        Args:
          images: that will be measured in all.
        """
        config = self.model.config
        if config.scan or not cpu.few(config, images) or not config.blocks_are_alike:
            return self
        # On the host: `jnp.stack` would compile a program for each shape.
        stacked = stack_layers(jax.tree.map(np.asarray, self.params))
        model = ViT(dataclasses.replace(config, scan=True))
        return self._replace(model=model, params=jax.device_put(stacked))


def load_checkpoint(
    source: str | pathlib.Path,
    *,
    arch: str | ViTConfig | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    drop_head: bool = False,
    **overrides: Any,
) -> Checkpoint:
    """Loads pretrained weights, with their preprocessing and class names.

    Args:
      source: a `.npz` (augreg, big_vision) or `.safetensors` (timm, Hugging Face, our own) file, a
        shard index, a folder with `config.json`, `hf:owner/name[@revision]`, or the name of the
        embedded weights, `vit_s14_caltech101`.
      arch: a name of `list_models()` or a `ViTConfig` that the file has to fit; otherwise the
        architecture is read from the shapes.
      image_size: pixels, an int or (height, width); the position embedding is resized as the
        library that the file came from does it. None keeps the file's own.
      num_classes: outputs that the head must have; None takes the file's.
      drop_head: leave the file's head out; with `num_classes=N` begin a new head of zeros.
      **overrides: fields of `ViTConfig`, such as `scan=True`, `dtype="bfloat16"`, `heads=12`,
        `activation="gelu_quick"`.

    Returns:
      The checkpoint; its `notes` say what was assumed.

    Raises:
      WeightsError: for anything that cannot be loaded, in one line with the way out.
      ValueError: for an unknown override or an image size that patches do not fill.
    """
    raw = open_source(source)
    size = None if image_size is None else as_pair(image_size, "image_size")
    form, arrays, ignored, facts = _read(raw, arch, overrides)
    notes = [f"{form.name} names in {', '.join(path.name for path in raw.files)}"]
    if ignored:
        notes.append(f"not used here: {architecture.few(ignored)}")
    try:
        flat, extra = read_names(form, arrays, architecture.find_heads(form, arrays, facts))
        notes += architecture.complete(form, flat, facts, size)
    except WeightsError:
        raise
    except (ValueError, IndexError) as error:
        raise WeightsError(
            f"{raw.label}: the arrays are not those of a Vision Transformer in {form.name}'s "
            f"layout ({error})"
        ) from error
    if drop_head:
        flat, extra = _without_head(flat), [n for n in extra if not n.startswith("pre_logits")]
    config = architecture.infer_config(flat, facts, arch if isinstance(arch, str) else None, size)
    if num_classes is not None or drop_head:
        config = dataclasses.replace(config, num_classes=num_classes or 0)
    config = ViTConfig.from_dict({**config.to_dict(), **overrides})
    if drop_head and config.num_classes:
        notes += _begin_head(flat, config)
    architecture.check_fit(flat, extra, config, raw.label)
    if size is not None and size != config.image_size:
        config, note = _resize(flat, config, size, facts)
        notes.append(note)
    names = _class_names(facts, config, drop_head, notes)
    _note_other_crop(facts, config, notes)
    return Checkpoint(
        model=ViT(config),
        params=_as_params(flat, config),
        preprocess=make_preprocess(facts, config.image_size),
        class_names=names,
        source=raw.label,
        sha256=raw.sha256(),
        notes=(*notes, *facts.notes()),
    )


def load_model(source: str | pathlib.Path, **settings: Any) -> tuple[ViT, dict[str, Any]]:
    """The model and the parameters of `load_checkpoint`, whose arguments it takes.

    The notes are logged at level INFO under the name of this module.
    """
    checkpoint = load_checkpoint(source, **settings)
    for note in checkpoint.notes:
        _LOGGER.info("%s: %s", checkpoint.source, note)
    return checkpoint.model, checkpoint.params


def _read(
    raw: RawWeights, arch: str | ViTConfig | None, overrides: Mapping[str, Any]
) -> tuple[Format, Arrays, list[str], Facts]:
    """Format, arrays under canonical names, names left aside, and facts."""
    names = sorted(raw.where)
    form = find_format(names)
    if form is None:
        raise WeightsError(
            f"{raw.label} is in no known format ({', '.join(f.name for f in FORMATS)}); its first "
            f"names are {', '.join(names[:4])}"
        )
    ignored = [name for name in names if is_ignored(form, name)]
    kept = {canonical(form, name): name for name in names if not is_ignored(form, name)}
    facts = gather_facts(form, {*names, *kept}, raw, arch)
    unshaped = ("heads", "activation", "norm_eps", "pool")
    facts.say("the caller", **{key: overrides[key] for key in unshaped if key in overrides})
    arrays = raw.read(kept.values())
    return form, {name: arrays[theirs] for name, theirs in kept.items()}, ignored, facts


def _without_head(flat: Arrays) -> Arrays:
    heads = ("head/", "head_dist/", "pre_logits/")
    return {path: array for path, array in flat.items() if not path.startswith(heads)}


def _begin_head(flat: Arrays, config: ViTConfig) -> list[str]:
    """A head of zeros, as big_vision begins a fine-tuning; changes `flat`."""
    for path, shape in architecture.expected_shapes(config).items():
        if path.startswith(("head/", "head_dist/")):
            flat[path] = np.zeros(shape, np.float32)
    return [f"a new head of {config.num_classes} classes: zeros, to be trained"]


def _resize(
    flat: Arrays, config: ViTConfig, size: tuple[int, int], facts: Facts
) -> tuple[ViTConfig, str]:
    """The config at another image size, its position embedding resized in `flat`."""
    resized = dataclasses.replace(config, image_size=size)
    old, new = config.layout, resized.layout
    method = facts.get("position_method")
    flat["pos_embedding"] = np.asarray(
        resize_position_embedding(
            flat["pos_embedding"], (old.rows, old.cols), (new.rows, new.cols),
            config.pos_prefix, method,
        )
    )  # fmt: skip
    return resized, (
        f"position embedding resized from {old.rows}x{old.cols} to {new.rows}x{new.cols} patches "
        f"({method})"
    )


def _class_names(
    facts: Facts, config: ViTConfig, dropped: bool, notes: list[str]
) -> tuple[str, ...] | None:
    names = facts.get("class_names")
    if not names or dropped or not config.num_classes:
        return None
    if len(names) != config.num_classes:
        notes.append(f"{len(names)} class names for {config.num_classes} outputs: left out")
        return None
    return tuple(names)


def _note_other_crop(facts: Facts, config: ViTConfig, notes: list[str]) -> None:
    """Hugging Face's DINOv2 is trained at 518 and meant to be used at 224."""
    edge = facts.get("crop_size")
    if edge is not None and edge != min(config.image_size):
        notes.append(
            f"preprocessor_config.json crops to {edge}, the model reads "
            f"{config.image_size[0]}x{config.image_size[1]}: pass image_size={edge} to follow it"
        )


def _as_params(flat: Arrays, config: ViTConfig) -> dict[str, Any]:
    nested = traverse_util.unflatten_dict(flat, sep="/")
    # All at once: `jnp.asarray` would compile a program for each shape.
    return jax.device_put(stack_layers(nested) if config.scan else nested)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a looped model as those of a scanned one: one block, a leading layer axis.

    Args:
      params: nested parameters with `Transformer/encoderblock_0`, `encoderblock_1`, ...; NumPy's
        arrays stay so.

    Returns:
      The same with a single stacked `Transformer/encoderblock`; the rest is shared, not copied.
    """
    encoder = dict(params["Transformer"])
    blocks = [encoder.pop(f"encoderblock_{i}") for i in range(_count_blocks(encoder))]
    encoder["encoderblock"] = jax.tree.map(_stack, *blocks)
    return {**params, "Transformer": encoder}


def _stack(*leaves: Any) -> Any:
    return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`.

    Args:
      params: nested parameters with a stacked `Transformer/encoderblock`.

    Returns:
      The same with `Transformer/encoderblock_0`, `encoderblock_1`, ...
    """
    encoder = dict(params["Transformer"])
    stacked = encoder.pop("encoderblock")
    depth = jax.tree.leaves(stacked)[0].shape[0]
    for i in range(depth):
        encoder[f"encoderblock_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**params, "Transformer": encoder}


def _count_blocks(encoder: Mapping[str, Any]) -> int:
    return sum(name.startswith("encoderblock_") for name in encoder)


def export_timm(
    model: ViT,
    params: Mapping[str, Any],
    path: str | pathlib.Path,
    *,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] | None = None,
    dtype: str = "float32",
) -> None:
    """Writes timm-named safetensors that `load_checkpoint` restores exactly.

    Config, preprocessing and class names go into the file's metadata; timm reads the tensors
    alone.

    Args:
      model: the architecture.
      params: its parameters, stacked when the model scans.
      path: the file to write; it appears whole or not at all.
      preprocess: what to do to pictures first.
      class_names: names of the outputs.
      dtype: `float32` is exact; `float16` halves the file.

    Raises:
      ValueError: for another dtype, a wrong number of names, or parameters of another model.
    """
    from safetensors.numpy import save_file

    path, config = pathlib.Path(path), model.config
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={dtype!r}: expected 'float32' or 'float16'")
    if class_names is not None and len(class_names) != config.num_classes:
        raise ValueError(f"{len(class_names)} class names for {config.num_classes} outputs")
    nested = unstack_layers(params) if config.scan else params
    flat = {
        name: np.asarray(leaf, np.float32)
        for name, leaf in traverse_util.flatten_dict(nested, sep="/").items()
    }
    architecture.check_fit(flat, [], config, "the given parameters")
    record = {
        "config": config.to_dict(),
        "preprocess": None if preprocess is None else preprocess.to_dict(),
        "class_names": None if class_names is None else list(class_names),
    }
    named = write_names(TIMM, architecture.without_pool_norm(flat, config))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file(
        {name: np.ascontiguousarray(array, dtype) for name, array in named.items()},
        unfinished,
        metadata={"format": "pt", METADATA_KEY: json.dumps(record)},
    )
    os.replace(unfinished, path)
