"""`vi.analyze_files`: image files in, everything about them as one labelled dataset out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from vit_interact.data.images import find_images, read_image
from vit_interact.data.naming import name_files
from vit_interact.observe.analyze import analyze
from vit_interact.observe.probe import Score

if TYPE_CHECKING:
    import xarray as xr

    from vit_interact.models.weights import Checkpoint


def analyze_files(
    checkpoint: Checkpoint,
    files: Sequence[str | os.PathLike[str]],
    indicator: str | Sequence[str] = "leave_one_out",
    coverage: float = 0.9,
    layers: Sequence[int] | None = None,
    score: Score = "predicted",
    batch_size: int = 8,
) -> xr.Dataset:
    """Reads, prepares and analyses a few images; `vi.show` shows the result.

    All is kept in memory, for 256 patches and 12 layers about 4 MB an image and indicator; for many
    images use `vit-interact analyze`, which writes to disk and goes on where it stopped.

    Args:
      checkpoint: from `vi.load_checkpoint`.
      files: image files, folders or glob patterns.
      indicator: as for `vi.analyze`, one or several.
      coverage: share of a row's impact that a window must hold, in (0, 1].
      layers: layers to measure; None is all.
      score: as for `vi.analyze`; a function gets the logits of a batch.
      batch_size: images at a time.

    Returns:
      The dataset of `vi.analyze` with the pictures as the model saw them (`picture`), the names of
      images and classes, and what made it.

    Raises:
      ValueError: for unknown options, no images, or batch sizes below 1.
      OSError: for a file that cannot be read as an image; it is named.
    """
    import xarray as xr

    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    found = find_images([os.fspath(file) for file in files])
    failures: list[tuple[str, str]] = []
    works = list(name_files(found, {}, failures))
    if failures:
        raise OSError(f"{failures[0][0]}: {failures[0][1]}")
    batch_size = min(batch_size, len(works))
    parts = []
    for start in range(0, len(works), batch_size):
        some = works[start : start + batch_size]
        pictures = np.stack([checkpoint.preprocess.picture(read_image(one.path)) for one in some])
        names = [one.name for one in some]
        options: Any = {
            "indicator": indicator, "coverage": coverage, "layers": layers, "score": score,
        }  # fmt: skip
        parts.append(analyze_pictures(checkpoint, pictures, names, batch_size, **options))
    return xr.concat(parts, "image", data_vars="minimal", coords="minimal", compat="override")


def analyze_pictures(
    checkpoint: Checkpoint,
    pictures: UInt8[np.ndarray, "B h w 3"],
    names: Sequence[str],
    batch_size: int,
    **options: Any,
) -> xr.Dataset:
    """The dataset of one batch, padded to one size so that one program serves all.

    Args:
      checkpoint: from `vi.load_checkpoint`.
      pictures: as `checkpoint.preprocess.picture` gives them.
      names: of the images.
      batch_size: size to pad to.
      **options: of `vi.analyze`.
    """
    padding = batch_size - len(pictures)
    padded = np.concatenate([pictures, np.repeat(pictures[:1], padding, axis=0)])
    config = checkpoint.model.config
    dataset = analyze(
        checkpoint.model, checkpoint.params, checkpoint.preprocess.normalize(padded), **options
    ).isel(image=slice(0, len(pictures)))
    dataset["picture"] = (("image", "y", "x", "channel"), pictures)
    dataset = dataset.assign_coords(image=("image", np.array(names, dtype=object)))
    if checkpoint.class_names is not None:
        classes = np.array(checkpoint.class_names, dtype=object)
        dataset = dataset.assign_coords(class_name=("class", classes))
    versions = {
        package: importlib.metadata.version(package)
        for package in ("vit-interact", "jax", "flax", "numpy")
    }
    score = options.get("score", "predicted")
    dataset.attrs.update(
        model=checkpoint.source,
        # Of the weights; how the layers were looped here is none of it.
        architecture=json.dumps(dataclasses.replace(config, scan=False).to_dict()),
        weights_sha256=checkpoint.sha256,
        score_of=str(score) if isinstance(score, str | int) else "given",
        patch_size=list(config.patch_size),
        preprocess=json.dumps(checkpoint.preprocess.to_dict()),
        versions=json.dumps(versions),
    )
    return dataset
