"""What a survey costs beside the plain forward pass, and its memory against the number of images.

    python -m benchmarks.statistics [--json] [--repeats 7] [--memory]

Forward pass and survey step take turns in one process; medians and the ratio of medians are
printed, for moments and fields of `attention` alone and with windows. `--memory` runs whole surveys
of 100 and of 1,000 images of a small model in processes of their own and prints their peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from vit_interact.survey import Design, observe, pool


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_s14_caltech101")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--survey", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.survey:
        print(json.dumps(_survey(options.survey)))
        return
    found: dict[str, Any] = {
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "batch_size": options.batch_size,
    }
    if options.memory:
        found["peak_mib"] = {images: _peak(images) for images in (100, 1000)}
    else:
        found |= _times(options.model, options.batch_size, options.repeats)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:28s} {value}")


def _times(name: str, batch: int, repeats: int) -> dict[str, Any]:
    model, params = vi.load_model(name)
    shape = (batch, *model.config.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    real = jnp.ones(batch, bool)

    def step(design: Design) -> Any:
        @jax.jit
        def call(statistics: Any, params: Any, images: jax.Array) -> Any:
            return pool(statistics, observe(design, model, params, images), real)

        empty = design.empty()
        return lambda: call(empty, params, images)

    forward = jax.jit(lambda params, images: model.apply({"params": params}, images))
    calls = {
        "forward": lambda: forward(params, images),
        "attention fields": step(Design.of(model, coverages=())),
        "with windows of 90 %": step(Design.of(model, coverages=(0.9,))),
    }
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(own)) for name, own in times.items()}
    found: dict[str, Any] = {f"{name}, s/image": t / batch for name, t in medians.items()}
    for name, median in medians.items():
        if name != "forward":
            found[f"{name}, ratio"] = median / medians["forward"]
    return found


def _peak(images: int) -> float:
    command = [sys.executable, "-m", "benchmarks.statistics", "--survey", str(images)]
    return float(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def _survey(images: int) -> float:
    """Peak memory, MiB, of a survey over the embedded images, repeated to that number."""
    from vit_interact.data.sources import open_examples
    from vit_interact.models.weights import load_checkpoint
    from vit_interact.survey.session import Survey

    with tempfile.TemporaryDirectory() as folder:
        model = vi.create_model("vit_ti16", num_classes=101, image_size=64)
        params = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
        weights = Path(folder) / "tiny.safetensors"
        vi.export_timm(model, params, weights)
        checkpoint = load_checkpoint(str(weights), image_size=64)
        examples = open_examples("embedded", None, 101)[0]
        examples = (examples * (images // len(examples) + 1))[:images]
        survey = Survey(
            checkpoint, examples, Design.of(checkpoint.model), Path(folder) / "s.zarr", "embedded"
        )
        survey.run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
