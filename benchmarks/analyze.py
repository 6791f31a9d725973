"""Time an image of `vit-interact analyze`, with its figures and without.

    python -m benchmarks.analyze [--few 8] [--many 40] [--repeats 3] [--json]

Runs the command in fresh processes, with compiled programs kept, over a few and over many of the
embedded photographs; what the others take beyond the few is measuring them, writing their arrays,
drawing their figures and their share of contact sheets and report. `cpu_image_s` is processor time
of all processes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.start import run
from vit_interact.data.samples import sample_images

_BATCH = 8  # what the command takes at a time, with a program for each size
_FIGURES = ("none", "received_impact", "all")


def measure(few: int, many: int, repeats: int) -> dict[str, list[common.Row]]:
    """Rows of every turn, by what is drawn."""
    images = [str(sample.path) for sample in sample_images(many)]
    found: dict[str, list[common.Row]] = {figures: [] for figures in _FIGURES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def analyze(count: int, figures: str, turn: int) -> common.Row:
            out = folder / f"{figures}-{count}-{turn}"
            options = ("--figures", figures, "--out", str(out))
            return run("analyze", *images[:count], *options, programs=folder / "programs")

        for count in {min(few, _BATCH), min(many, _BATCH)}:
            analyze(count, "none", 0)
        for turn in range(1, repeats + 1):
            for figures, rows in found.items():
                less, more = (analyze(count, figures, turn) for count in (few, many))
                rows.append({"few_s": less["all_s"], **_each(less, more, many - few)})
    return found


def _each(less: common.Row, more: common.Row, images: int) -> common.Row:
    """What each of the further images took."""
    names = {"image_s": "all_s", "cpu_image_s": "cpu_all_s"}
    return {name: (more[column] - less[column]) / images for name, column in names.items()}


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=3)
    parser.add_argument("--few", type=int, default=8, help="photographs that both runs have")
    parser.add_argument(
        "--many", type=int, default=40, help="photographs of the longer run, to 202"
    )
    options = parser.parse_args()
    if not 0 < options.few < options.many:
        parser.error(f"--few {options.few} --many {options.many}: expected 0 < few < many")
    settings = {"model": "vit_s14_caltech101", "few": options.few, "many": options.many}
    report = common.Report("analyze", settings)
    for figures, turns in measure(options.few, options.many, options.repeats).items():
        medians = {name: float(np.median([turn[name] for turn in turns])) for name in turns[0]}
        report.add(figures=figures, **medians, images_s=1 / medians["image_s"])
    report.show(options.json)


if __name__ == "__main__":
    main()
