"""Images/s from disk to device, by stage and as training reads them.

    python -m benchmarks.data_path [--images DIR] [--size 224] [--json]

Stages are timed alone, in one thread: reading files, decoding, decoding and resizing, and copying
batches to the device. Then whole ways take turns, each with `--threads` threads: a bare Pillow loop
(open, convert, resize), the same with libjpeg-turbo through simplejpeg where it is installed, and
our own pipeline from the folder and, where TFDS and array_record are, from the same photographs as
ArrayRecord. `share` is over the bare Pillow loop; `cpu_share` compares the processor's time for an
image. Docs/benchmarks.md has the rule for workers and threads that follows.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import common
from vit_interact.data.images import find_images, read_image
from vit_interact.data.labelled import Labelled, open_split
from vit_interact.data.pipeline import Reading, batches
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.samples import sample_weights


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--images", type=Path, default=sample_weights().parent / "caltech101",
                        help="folder; the embedded photographs if unset")  # fmt: skip
    parser.add_argument("--limit", type=int, default=192, help="photographs")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    paths = find_images([options.images])[: options.limit]
    fixed = {
        "images": len(paths),
        "mean_kb": sum(path.stat().st_size for path in paths) / len(paths) / 1e3,
        "pixels": options.size,
        "batch": options.batch,
        "threads": options.threads,
    }
    report = common.Report("data_path", fixed, ("pillow", "grain", "simplejpeg", "array_record"))
    for row in stages(paths, options):
        report.add(**row)
    for row in ways(paths, options):
        report.add(**row)
    report.show(options.json)


def stages(paths: list[Path], options: Any) -> list[common.Row]:
    """Each stage alone, in one thread."""
    preprocess = Preprocess(size=(options.size, options.size))
    batch = np.zeros((options.batch, options.size, options.size, 3), np.uint8)
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: [path.read_bytes() for path in paths],
        "read, decode": lambda: [read_image(path) for path in paths],
        "read, decode, resize": lambda: [preprocess.picture(read_image(path)) for path in paths],
    }
    if importlib.util.find_spec("simplejpeg"):
        calls["read, decode by libjpeg-turbo"] = lambda: [_turbo(path) for path in paths]
    times = common.take_turns(calls, options.repeats)
    rows = [_row(f"stage: {name}", own, len(paths)) for name, own in times.items()]
    moves = {"transfer": lambda: jax.device_put(batch)}
    own = common.take_turns(moves, options.repeats)["transfer"]
    return [*rows, _row("stage: transfer to the device", own, options.batch)]


def _row(what: str, own: common.Times, images: int) -> common.Row:
    return {
        "what": what,
        "images_s": images / own.seconds,
        "cpu_ms_image": 1e3 * own.cpu_seconds / images,
    }


def _turbo(path: Path) -> np.ndarray:
    """Decoded by libjpeg-turbo; what is no plain JPEG goes to Pillow."""
    import simplejpeg

    content = path.read_bytes()
    if simplejpeg.is_jpeg(content):
        return simplejpeg.decode_jpeg(content)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _bare(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _bare_turbo(path: Path, size: int) -> np.ndarray:
    image = Image.fromarray(_turbo(path))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _stretch(image: Image.Image, generator: np.random.Generator, size: int) -> np.ndarray:
    del generator
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def ways(paths: list[Path], options: Any) -> list[common.Row]:
    """From disk to device in every way, by turns; all resize the whole photograph alike."""
    size, batch = options.size, options.batch
    steps = len(paths) // batch
    if not steps:
        raise SystemExit(f"{len(paths)} images are fewer than a batch of {batch}")
    used = paths[: steps * batch]

    def loop(decode: Callable[[Path, int], np.ndarray]) -> Callable[[], None]:
        def call() -> None:
            with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
                pictures = list(pool.map(functools.partial(decode, size=size), used))
            for start in range(0, len(used), batch):
                jax.block_until_ready(jax.device_put(np.stack(pictures[start : start + batch])))

        return call

    def ours(source: Labelled, workers: int = 0) -> Callable[[], None]:
        reading = Reading(workers=workers, threads=options.threads)
        picture = functools.partial(_stretch, size=size)

        def call() -> None:
            found = batches(source, picture, (size, size), batch, range(steps), shuffle=False,
                            reading=reading)  # fmt: skip
            for one in found:
                jax.block_until_ready(jax.device_put(one["pictures"]))

        return call

    with tempfile.TemporaryDirectory() as folder:
        bare = "bare Pillow loop"
        calls = {bare: loop(_bare)}
        if importlib.util.find_spec("simplejpeg"):
            calls["bare libjpeg-turbo loop"] = loop(_bare_turbo)
        source = Listed(used)
        calls["ours, folder"] = ours(source)
        record = _as_records(used, Path(folder))
        if record is not None:
            calls["ours, ArrayRecord"] = ours(record)
        times = common.take_turns(calls, options.repeats)
    rows = []
    for name, own in times.items():
        row = _row(name, own, len(used))
        row["share"] = 1 / own.ratio(times[bare])
        row["cpu_share"] = 1 / own.cpu_ratio(times[bare])
        rows.append(row)
    return rows


class Listed:
    """Photographs of a list of files, in its order; see `Labelled`."""

    class_names = ("any",)

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.labels = paths, np.zeros(len(paths), np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Decodes the file."""
        return read_image(self.paths[index]), 0


def _as_records(paths: list[Path], folder: Path) -> Labelled | None:
    """The same files as a TFDS data set in ArrayRecord, or None where that is not installed."""
    if not (importlib.util.find_spec("tensorflow_datasets")
            and importlib.util.find_spec("array_record")):  # fmt: skip
        return None
    import tensorflow_datasets as tfds

    class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """All files in one split."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            kinds = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["any"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for index, path in enumerate(paths):
                yield index, {"image": io.BytesIO(path.read_bytes()), "label": 0}

    builder = Photographs(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the JSON object
        builder.download_and_prepare()
    # This process's own data set, as a user names where theirs lie.
    os.environ["TFDS_DATA_DIR"] = str(folder)
    return open_split("tfds:photographs", "train")


if __name__ == "__main__":
    main()
