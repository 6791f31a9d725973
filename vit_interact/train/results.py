"""What a run leaves behind beside its checkpoints: weights, figures, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vit_interact.data.naming import visible
from vit_interact.data.preprocess import Preprocess
from vit_interact.models.vit import ViT
from vit_interact.models.weights import export_timm
from vit_interact.train.evaluate import scalars
from vit_interact.train.inputs import Inputs
from vit_interact.train.log import Log, read_lines
from vit_interact.train.sharding import replicated
from vit_interact.train.showing import Showing
from vit_interact.train.state import TrainState

MODEL = "model.safetensors"


def describe(
    config: Mapping[str, Any], model: ViT, preprocess: Preprocess, inputs: Inputs, steps: int
) -> dict[str, Any]:
    """What run this is, as JSON; kept in every checkpoint."""
    return {
        "config": dict(config),
        "model": json.loads(json.dumps(model.config.to_dict())),
        "preprocess": json.loads(json.dumps(preprocess.to_dict())),
        "class_names": [visible(name) for name in inputs.class_names],
        "images": len(inputs.train),
        "steps": steps,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def overview(model: ViT, mesh: Mesh, inputs: Inputs, batch_size: int, steps: int) -> str:
    """One line for people."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    held = "" if inputs.val is None else f", {len(inputs.val):,} to choose on"
    return (
        f"{model.config.count_parameters() / 1e6:.1f} M parameters; {len(inputs.train):,} images "
        f"of {len(inputs.class_names)} classes to train on{held}; {steps:,} steps of {batch_size}; "
        f"{mesh.size} {jax.devices()[0].device_kind}" + (f" ({axes})" if axes else "")
    )


def export(
    workdir: Path,
    state: TrainState,
    model: ViT,
    preprocess: Preprocess,
    class_names: tuple[str, ...],
    mesh: Mesh,
) -> None:
    """Writes `model.safetensors`, with which the workdir opens by `load_model`."""
    # Gathered by all processes; the first one writes.
    whole = jax.jit(lambda params: params, out_shardings=replicated(mesh))(state.best_params)
    if jax.process_index() == 0:
        params = jax.device_get(whole)
        names = [visible(name) for name in class_names]
        export_timm(model, params, workdir / MODEL, preprocess=preprocess, class_names=names)


def write_figures(
    workdir: Path,
    split: str,
    figures: Mapping[str, Any],
    names: tuple[str, ...],
    log: Log,
    step: int,
    curve: bool,
    last: bool,
) -> None:
    """Says how a split went, and leaves `SPLIT.json` and, at last, `SPLIT_confusion.png`.

    Args:
      workdir: of the run.
      split: its name.
      figures: of `Evaluation.compute`.
      names: of the classes.
      log: of the run.
      step: whose parameters these are.
      curve: whether the figures belong on the curves, too.
      last: whether the split is not evaluated again in this run.
    """
    log.say(
        f"{split} at step {step}: top-1 {figures['accuracy']:.2%}, top-5 {figures['top5']:.2%}, "
        f"loss {figures['loss']:.4f}, calibration error {figures['calibration_error']:.3f} "
        f"({figures['examples']:,} images)"
    )
    if not log.writes:
        return
    if curve:
        log.write(step, {f"{split}/{name}": value for name, value in scalars(figures).items()})
    each = {
        name: None if math.isnan(value) else value
        for name, value in zip(names, figures["per_class"].tolist(), strict=True)
    }
    content = {"step": step, **scalars(figures), "per_class": each}
    (workdir / f"{split}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if not last:
        return
    from vit_interact.viz.png import save
    from vit_interact.viz.training import draw_confusion

    save(draw_confusion(figures, names), workdir / f"{split}_confusion.png")


def draw(workdir: Path, log: Log, showing: Showing | None = None) -> None:
    """Leaves `curves.png`, and `windows.png` of a model that predicts windows."""
    if not log.writes:
        return
    from vit_interact.viz.png import save
    from vit_interact.viz.training import draw_curves

    if lines := read_lines(log.path):
        save(draw_curves(lines), workdir / "curves.png")
    if showing is not None and showing.seen is not None:
        save(showing.draw(*showing.seen), workdir / "windows.png")
