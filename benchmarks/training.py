"""Images/s of the data path alone, of the training step, and what the indicator alongside adds.

    python -m benchmarks.training [--json] [--model vit_ti16] [--size 112] [--batch-size 32]

The data path reads the embedded photographs again and again: decoded each time or kept in memory,
with augmentation by the host and without, and with it by the device. Then training steps (plain,
with predicted windows, with guidance of them) and indicator runs take turns in one process. `mfu`
is the step's matrix products over the device's peak; the last rows are what guidance, and an
indicator every 100 steps, cost. A step of Hugging Face's ViT in PyTorch (SDPA, AdamW; compiled on a
GPU) takes turns, too, unless `--no-peer`; its `ratio` is to our step, as of the others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import vit_interact as vi
from benchmarks import common
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.samples import sample_weights
from vit_interact.models.vit import ViT
from vit_interact.train.alongside import Alongside
from vit_interact.train.config import default_config
from vit_interact.train.inputs import EvalFeed, Feed, Inputs, make_augment
from vit_interact.train.optimizer import frozen_leaves, make_optimizer, make_schedule
from vit_interact.train.sharding import make_mesh
from vit_interact.train.speed import peak_flops, step_flops
from vit_interact.train.state import create_state, param_shapes
from vit_interact.train.step import Recipe, make_train_step
from vit_interact.train.windows import plan_windows

EVERY = 100


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--model", default="vit_ti16")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    common.add_no_peer(parser)
    options = parser.parse_args()
    fixed = {"model": options.model, "pixels": options.size, "batch": options.batch_size,
             "dtype": options.dtype}  # fmt: skip
    peer = common.has_peer(options)  # before jax takes a GPU's memory
    report = common.Report("training", fixed, ("flax", "optax", "grain", "torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        _run(report, make_config(options, photographs(options.batch_size, folder)), options, peer)
    report.show(options.json)


def _run(report: common.Report, config: Any, options: argparse.Namespace, peer: bool) -> None:
    for row in [*data_path(config, options.repeats), *_steps(config, options.repeats, peer)]:
        report.add(**row)


def photographs(batch: int, folder: str) -> Path:
    """The embedded photographs, linked as often as makes two batches; the folder."""
    every = sorted((sample_weights().parent / "caltech101").glob("*/*.jpg"))
    for number in range(-(-2 * batch // len(every))):
        for path in every:
            link = Path(folder, path.parent.name, f"{number}_{path.name}")
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(path)
    return Path(folder)


def make_config(options: argparse.Namespace, folder: Path) -> Any:
    """The trainer's settings for options of this benchmark and photographs in a folder."""
    config = default_config()
    config.data.source = str(folder)
    config.batch_size = options.batch_size
    config.model.name, config.model.dtype = options.model, options.dtype
    config.model.image_size = (options.size, options.size)
    config.interactions.images = options.batch_size
    return config


def data_path(config: Any, repeats: int) -> list[common.Row]:
    """Images/s of the path that training uses, without training."""
    rows = []
    size = tuple(config.model.image_size)
    mesh = make_mesh()
    source = Inputs(config).train
    for cache in ("none", "memory"):
        for crop in ((0.08, 1.0), ()):
            copy = config.copy_and_resolve_references()
            copy.data.cache, copy.augment.where = cache, "host"
            copy.augment.crop, copy.augment.flip = crop, bool(crop)
            feed = Feed(source, copy, mesh, size)
            steps = 2 + repeats * 4
            batches = feed.batches(range(steps))
            for _ in range(2):
                jax.block_until_ready(next(batches))
            start = time.perf_counter()
            jax.block_until_ready(list(batches))
            rate = (steps - 2) * config.batch_size / (time.perf_counter() - start)
            kept = "decoded each time" if cache == "none" else "kept in memory"
            how = "crop and flip" if crop else "no augmentation"
            rows.append({"what": f"data, {kept}, {how}", "images_s": rate})
    return rows


def _steps(config: Any, repeats: int, peer: bool) -> list[common.Row]:
    """Steps and the indicator alongside, by turns; each arm's MFU is of its own arithmetic."""
    size = tuple(config.model.image_size)
    model = vi.create_model(
        config.model.name, num_classes=101, image_size=size, dtype=config.model.dtype
    )
    mesh, preprocess = make_mesh(), Preprocess(size=size)
    source = Inputs(config).train
    calls: dict[str, Callable[[], Any]] = {}
    configs: dict[str, Any] = {}
    arms = {
        "step": ("host", "", ""),
        "step with crop and flip on the device": ("device", "", ""),
        "step with predicted windows": ("host", "predicted", ""),
        f"step, windows guided by 1 in {config.winft.every} images": ("host", "predicted", "self"),
    }
    for label, (where, windows, guide) in arms.items():
        copy = config.copy_and_resolve_references()
        copy.augment.where, copy.winft.windows, copy.winft.guide = where, windows, guide
        calls[label], configs[label] = _step(copy, model, source, mesh, preprocess)
    feed = EvalFeed(source, config, mesh, preprocess)
    watched = Alongside.of(config.interactions, model, preprocess, mesh, feed)
    last = jax.tree.map(jnp.copy, calls["step"]().params)

    def watch() -> Any:
        watched.begin(0, last)
        return watched.take()

    calls["indicator, fields and windows"] = watch
    if peer:
        calls["step in PyTorch"] = peer_step(model, config)
        configs["step in PyTorch"] = model.config
    times = common.take_turns(calls, repeats, pause=0.02 if peer else 0)
    step, batch = times["step"], config.batch_size
    peak, _ = peak_flops(jax.device_count())
    rows: list[common.Row] = []
    for name, own in times.items():
        row: common.Row = {
            "what": name,
            "images_s": batch / own.seconds,
            "s_step": own.seconds,
            "ratio": own.ratio(step),
            "cpu_ratio": own.cpu_ratio(step),
        }
        if name in configs:
            row["mfu"] = batch * step_flops(configs[name]) / own.seconds / peak
        rows.append(row)
    guided = next(name for name in arms if "guided" in name)
    predicted = times["step with predicted windows"]
    alongside = times["indicator, fields and windows"]
    rows.append({
        "what": "guidance over the step without it",
        "ratio": times[guided].ratio(predicted), "cpu_ratio": times[guided].cpu_ratio(predicted),
    })  # fmt: skip
    rows.append({
        "what": f"step with the indicator every {EVERY} steps",
        "ratio": 1 + alongside.ratio(step) / EVERY,
        "cpu_ratio": 1 + alongside.cpu_ratio(step) / EVERY,
    })  # fmt: skip
    return rows


def _step(
    config: Any, model: ViT, source: Any, mesh: Any, preprocess: Preprocess
) -> tuple[Callable[[], Any], Any]:
    """A call that trains on one batch again and again, and the model's config."""
    step, state, data, of_model = step_program(config, model, source, mesh, preprocess)
    return repeated(step, state, *data), of_model


def repeated(step: Callable[..., Any], state: Any, *data: Any) -> Callable[[], Any]:
    """A call that makes one more step; it gives the new state, which the next call uses up."""
    latest = [state]

    def call() -> Any:
        latest[0], _ = step(latest[0], *data)
        return latest[0]

    return call


def step_program(
    config: Any, model: ViT, source: Any, mesh: Any, preprocess: Preprocess
) -> tuple[Any, Any, Any, Any]:
    """The jitted step, a state that it uses up, a batch and pictures kept, the model's config."""
    plan = plan_windows(config, model, None, 1000)
    model, shapes = plan.model, param_shapes(plan.model)
    schedule = make_schedule(config.schedule, 1000, 100.0)
    rule = make_optimizer(config.optimizer, schedule, shapes, model.config.depth)
    device = config.augment.where == "device"
    recipe = Recipe(
        model, rule, frozen_leaves(shapes, ""), make_augment(config.augment), device, preprocess, 0,
        guide=plan.guide, weight=plan.weight, sharpness=plan.sharpness,
    )  # fmt: skip
    step = jax.jit(make_train_step(recipe), donate_argnums=0)
    state = create_state(model, rule, mesh, 0, running=recipe.nothing())
    size = tuple(config.model.image_size)
    feed = Feed(source, config, mesh, size)
    return step, state, (next(feed.batches(range(1))), feed.store), model.config


def peer_step(model: ViT, config: Any) -> Callable[[], Any]:
    """A call that trains PyTorch's model of the same sizes on noise."""
    import torch

    from benchmarks import torch_route

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    where = torch_route.where()
    pixels = torch.randn(config.batch_size, 3, *config.model.image_size, device=where)
    labels = torch.arange(config.batch_size, device=where) % model.config.num_classes
    mixed = config.model.dtype == "bfloat16"
    return torch_route.training_step(
        torch_route.build(model.config).to(where), pixels, labels, mixed
    )


if __name__ == "__main__":
    main()
