"""What a survey costs beside the forward pass, and `Statistics` beside NumPy and SciPy.

    python -m benchmarks.statistics [--parts survey,update] [--json]
    python -m benchmarks.statistics --parts memory

`survey`: forward pass and survey step take turns in one process, for moments and fields of
`attention` alone and with windows. `update`: one batch folded into statistics of a map `[P]` with a
histogram, P from 64 to 4,096, beside NumPy (Chan's update in float64, `searchsorted` and
`bincount`) and `scipy.stats.describe`, which makes no histogram and cannot go on. `memory`: whole
surveys of 100 and of 1,000 images of a small model, each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact.interactions.statistics import Statistics
from vit_interact.models.cpu import compiler_options
from vit_interact.survey import Design, observe, pool

PARTS = ("survey", "update", "memory")
EDGES = np.linspace(-3, 3, 65)


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=7)
    parser.add_argument("--parts", type=common.some_of(PARTS), default=["survey", "update"])
    parser.add_argument("--model", default="vit_s14_caltech101")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sides", type=common.numbers, default=common.numbers("8,16,24,37,64"))
    parser.add_argument("--survey", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.survey:
        print(json.dumps(_survey(options.survey)))
        return
    fixed = {"model": options.model, "batch": options.batch_size, "dtype": "float32"}
    report = common.Report("statistics", fixed, ("scipy",))
    if "survey" in options.parts:
        for row in survey_cost(options.model, options.batch_size, options.repeats):
            report.add(**row)
    if "update" in options.parts:
        rows = [update_cost(side**2, options.batch_size, options.repeats) for side in options.sides]
        common.add_growth(rows, "cpu_us_image")
        for row in rows:
            report.add(**row)
    if "memory" in options.parts:
        for images in (100, 1000):
            report.add(what=f"survey of {images} images", peak_mib=_peak(images))
    report.show(options.json)


def survey_cost(name: str, batch: int, repeats: int) -> list[common.Row]:
    """Forward pass, and surveys with it."""
    model, params = vi.load_model(name)
    shape = (batch, *model.config.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    real = jnp.ones(batch, bool)
    # As a survey's own program, and the forward pass alike.
    jit = functools.partial(jax.jit, compiler_options=compiler_options(model, batch))

    def step(design: Design) -> Any:
        @jit
        def call(statistics: Any, params: Any, images: jax.Array) -> Any:
            return pool(statistics, observe(design, model, params, images), real)

        empty = design.empty()
        return lambda: call(empty, params, images)

    forward = jit(lambda params, images: model.apply({"params": params}, images))
    calls = {
        "forward": lambda: forward(params, images),
        "attention fields": step(Design.of(model, coverages=())),
        "with windows of 90 %": step(Design.of(model, coverages=(0.9,))),
    }
    times = common.take_turns(calls, repeats)
    return [
        {
            "what": name,
            "us_image": 1e6 * own.seconds / batch,
            "cpu_us_image": 1e6 * own.cpu_seconds / batch,
            "ratio": own.ratio(times["forward"]),
            "cpu_ratio": own.cpu_ratio(times["forward"]),
        }
        for name, own in times.items()
    ]


class PlainStatistics:
    """The same in NumPy float64: Chan's update, range and a histogram of each element."""

    def __init__(self, patches: int) -> None:
        self.count, self.mean, self.m2 = 0, np.zeros(patches), np.zeros(patches)
        self.min, self.max = np.full(patches, np.inf), np.full(patches, -np.inf)
        self.bins = np.zeros((patches, len(EDGES) + 1), np.int64)

    def update(self, x: np.ndarray) -> None:
        """Adds `[B, P]`."""
        count, mean = len(x), x.mean(axis=0)
        total, delta = self.count + count, mean - self.mean
        self.m2 += ((x - mean) ** 2).sum(axis=0) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        self.min = np.minimum(self.min, x.min(axis=0))
        self.max = np.maximum(self.max, x.max(axis=0))
        wide = self.bins.shape[1]
        place = np.searchsorted(EDGES, x, side="right") + np.arange(x.shape[1]) * wide
        self.bins += np.bincount(place.ravel(), minlength=self.bins.size).reshape(self.bins.shape)


def update_cost(patches: int, batch: int, repeats: int) -> common.Row:
    """One batch `[B, P]` folded in, ours and theirs by turns."""
    x = np.random.default_rng(0).normal(size=(batch, patches)).astype(np.float32)
    device, empty = jnp.asarray(x), Statistics.empty((patches,), EDGES)
    calls: dict[str, Any] = {
        "ours": lambda: empty.update(device),
        "numpy": lambda: PlainStatistics(patches).update(x),
    }
    try:
        from scipy import stats
    except ImportError:
        pass
    else:
        calls["scipy"] = lambda: stats.describe(x)
    times = common.take_turns(calls, repeats)
    row: common.Row = {
        "what": "update with histogram",
        "patches": patches,
        "us_image": 1e6 * times["ours"].seconds / batch,
        "cpu_us_image": 1e6 * times["ours"].cpu_seconds / batch,
        "numpy_us_image": 1e6 * times["numpy"].seconds / batch,
        "cpu_ratio": times["ours"].cpu_ratio(times["numpy"]),
    }
    if "scipy" in times:
        row["scipy_us_image"] = 1e6 * times["scipy"].seconds / batch
    return row


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
