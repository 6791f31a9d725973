"""Draws one figure of each kind into docs/images/gallery/ and writes docs/gallery.md around them.

Photographs and weights are the embedded ones; verification and training curves are of the runs in
docs/results/. Analyses, a survey and a short training run are made here, by the package's commands.

Examples:
  python tools/gallery.py
  python tools/gallery.py --work /tmp/gallery --only field,verify_removal
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "images" / "gallery"
RESULTS = ROOT / "docs" / "results"
PHOTOGRAPHS = ROOT / "vit_interact" / "assets" / "caltech101"
SHOWN = ("dalmatian", "Faces", "flamingo", "sunflower", "elephant", "schooner")

# Bytes of one picture, so that all of them stay below 1.5 MB.
MOST = 98_000

ANALYZE = "vit-interact analyze photos/ --model WEIGHTS --out result"
VERIFY = "vit-interact verify --model WEIGHTS --data photos_by_class/ --out checked"
SURVEY = (
    "vit-interact statistics --model WEIGHTS --data photos/ --indicators attention,leave_one_out "
    "--coverages 0.5,0.9 --out stats.zarr"
)
TRAIN = (
    "python -m vit_interact.train --config=configs/folder.py --workdir=runs/mine "
    "--config.data.source=photos_by_class/ --config.init=WEIGHTS"
)


class Work:
    """What figures are drawn from; made when first asked for, and kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def analysis(self) -> Any:
        """The embedded model on six photographs."""
        return self._analyze("analysis", "vit_s14_caltech101", SHOWN)

    @functools.cached_property
    def predicted(self) -> Any:
        """The short run on one photograph."""
        return self._analyze("predicted", str(self.run), SHOWN[1:2])

    @functools.cached_property
    def survey(self) -> Any:
        """40 embedded photographs."""
        import xarray as xr

        out = self.folder / "stats.zarr"
        self._call(
            out, "vit_interact.cli", "statistics", "--data", "embedded", "--limit", "40",
            "--indicators", "attention,leave_one_out", "--coverages", "0.5,0.9", "--out", str(out),
        )  # fmt: skip
        return xr.open_zarr(out, consolidated=False)

    @functools.cached_property
    def run(self) -> Path:
        """A window-free transformer made of the embedded model, 24 steps of 16 photographs."""
        out = self.folder / "run"
        settings = {
            "data.source": PHOTOGRAPHS, "data.holdout": 0.5, "init": "vit_s14_caltech101",
            "batch_size": 16, "steps": 24, "log_every": 4, "eval.every": 24,
            "checkpoint.every": 24, "checkpoint.export": "last", "tensorboard": False,
            "winft.every": 2, "winft.weight": "(4.0,4.0)", "optimizer.window_rate": 100.0,
        }  # fmt: skip
        self._call(
            out / "windows.png", "vit_interact.train",
            "--config=configs/winft_caltech101.py:winft", f"--workdir={out}",
            *(f"--config.{name}={value}" for name, value in settings.items()),
        )  # fmt: skip
        return out

    def _analyze(self, name: str, model: str, classes: tuple[str, ...]) -> Any:
        import xarray as xr

        out = self.folder / name
        photographs = [str(min((PHOTOGRAPHS / one).glob("*.jpg"))) for one in classes]
        self._call(
            out / "index.html", "vit_interact.cli", "analyze", *photographs,
            "--model", model, "--out", str(out),
        )  # fmt: skip
        return xr.open_zarr(out / "analysis.zarr", consolidated=False)

    def _call(self, made: Path, module: str, *arguments: str) -> None:
        """Runs a command of the package unless what it makes is there."""
        if made.exists():
            return
        print("python -m", module, shlex.join(arguments), flush=True)
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{module} ended with {done.returncode}")


class Entry(NamedTuple):
    """One picture of the page.

    Attributes:
      title: its heading.
      file: name below docs/images/gallery.
      says: one sentence on how to read it.
      command: makes it of one's own data.
      leaves: where that command leaves it.
      draw: the figure.
    """

    title: str
    file: str
    says: str
    command: str
    leaves: str
    draw: Callable[[Work], Figure]


def _viz(module: str) -> Any:
    return importlib.import_module(f"vit_interact.viz.{module}")


def _checked(name: str, run: str) -> Callable[[Work], Figure]:
    return lambda _: getattr(_viz("verification"), name)(_result(f"{run}.json"))


def _left(name: str, shrink: int = 1) -> Callable[[Work], Figure]:
    """What the run has left, as a figure of its pixels, or of every `shrink` averaged."""

    def draw(work: Work) -> Figure:
        from PIL import Image

        pixels = Image.open(work.run / name).convert("RGB").reduce(shrink)
        figure = Figure(figsize=(pixels.width / 100, pixels.height / 100), dpi=100)
        figure.figimage(np.asarray(pixels))
        return figure

    return draw


def _tendency(work: Work) -> Figure:
    from vit_interact.layout import TokenLayout

    data = work.analysis.isel(image=2)
    layout = TokenLayout(data.sizes["row"], data.sizes["col"], 1)
    arrows = data["tendency"].values
    return _viz("training").draw_tendency(data["picture"].values, arrows, layout)


def _arms(_: Work) -> Figure:
    arms = {
        name: [[tuple(point) for point in run["val_by_epoch"]] for run in arm["runs"].values()]
        for name, arm in _result("winft_cifar.json")["arms"].items()
    }
    return _viz("training").draw_arms(arms)


def _result(file: str) -> Any:
    return json.loads((RESULTS / file).read_text("utf-8"))


def entries() -> dict[str, list[Entry]]:
    """All pictures, by section of the page."""

    def image(stem: str, title: str, says: str, photograph: int = 0) -> Entry:
        def draw(work: Work) -> Figure:
            data = work.predicted if stem == "predicted" else work.analysis
            return _viz("figures").FIGURES[stem](data.isel(image=photograph))

        leaves = f"result/images/NAME/{stem}.png"
        return Entry(title, f"{stem}.jpg", says, ANALYZE, leaves, draw)

    analysis = [
        image(
            "received_impact", "Received impact",
            "The lighter a patch, the more it matters to all others; below, the same for each "
            "layer, each map on its own scale with its largest value under it.",
        ),
        image(
            "interaction", "Interactions of the strongest patches",
            "In each panel the patch outlined in blue takes most from the lightest patches; the "
            "white box is the smallest one that holds 90 % of all it takes.", 3,
        ),
        image(
            "windows", "Adaptive windows",
            "Left, windows of nine patches; in the middle, a yellow patch needs a large window; "
            "right, a yellow patch lies in the windows of most others.", 4,
        ),
        image(
            "field", "Responsive field",
            "An arrow points to where a patch's impact comes from on average, coloured by the "
            "wheel; spread is how far it comes from; an ellipse holds one standard deviation.", 1,
        ),
        image(
            "growth", "Growth of the field with depth",
            "Each point is a layer: the median over the patches of one image, with the middle "
            "half of them as a band; higher means that patches reach further.", 2,
        )._replace(file="growth.png"),
        image(
            "removal", "Removal of the least discriminative patches",
            "Grey patches are those that matter least, at five shares; the map has the whole "
            "order, dark patches going first.", 5,
        ),
        image(
            "predicted", "Predicted windows",
            "Of a window-free transformer: solid lines are the windows that three patches "
            "predict for themselves, dashed ones those of the indicator.",
        )._replace(command=ANALYZE.replace("WEIGHTS", "runs/mine")),
        Entry(
            "Contact sheet", "contact_sheet.jpg",
            "Each image three times: as the model saw it, with received impact over it (light: "
            "much), and with the arrows of its patches.",
            ANALYZE, "result/contact_sheet.png",
            lambda work: _viz("report").draw_contact_sheet(work.analysis),
        ),
    ]  # fmt: skip
    verification = [
        Entry(
            "Accuracy inside windows", "verify_windows.png",
            "A curve further up and left keeps the accuracy with smaller windows; the line across "
            "is the model without windows.",
            VERIFY, "checked/windows.png", _checked("draw_windows_curves", "choosing"),
        ),
        Entry(
            "Windows against boxes of the same area", "verify_controls.png",
            "An indicator is worth something where its coloured curve lies above the grey ones, "
            "which are boxes of the same area chosen without it.",
            VERIFY, "checked/windows.png",
            _checked("draw_windows_curves", "windows_leave_one_out"),
        ),
        Entry(
            "Accuracy without patches", "verify_removal.png",
            "The later a curve falls, the better its order of removal finds patches that the "
            "model does not need; grey curves are orders without an indicator.",
            VERIFY, "checked/removal.png", _checked("draw_removal_curves", "removal"),
        ),
        Entry(
            "Faithfulness", "verify_faithfulness.png",
            "Left, a dot near 1 ranks edges as really cutting them does; in the middle, masking "
            "the strongest edges should move the logit and masking the weakest should not; right, "
            "a curve should fall as weights are redrawn.",
            VERIFY + " --tests faithfulness", "checked/faithfulness.png",
            _checked("draw_faithfulness", "faithfulness"),
        ),
    ]  # fmt: skip

    def survey(name: str, file: str, title: str, says: str, *arguments: str) -> Entry:
        def draw(work: Work) -> Figure:
            return getattr(_viz("survey"), name)(work.survey, *arguments)

        leaves = f"stats_figures/{'_'.join([file, *arguments])}.png"
        return Entry(title, f"statistics_{file}.png", says, SURVEY, leaves, draw)

    statistics = [
        survey(
            "draw_kernel", "kernel", "Mean interaction by offset",
            "The middle of each map is the patch itself; the lighter a place, the more patches at "
            "that offset give to it, on average over images and on one logarithmic scale.",
            "attention",
        ),
        survey(
            "draw_values", "values", "How often values occur",
            "Each row is a layer: the darker a bin, the more entries have that value; left of the "
            "dashed line are pairs that interact less than in an even row.",
        ),
        survey(
            "draw_fields", "fields", "Fields by depth",
            "Spread, length of the tendency and entropy against the layer; higher means a wider, "
            "more one-sided and more even field.",
        ),
        survey(
            "draw_distance", "attention_distance", "Attention distance",
            "Each dot is a head: low ones look near by, high ones across the image.",
        ),
        survey(
            "draw_windows", "windows", "Windows by depth",
            "Share of the grid, and sides, of the smallest windows that hold 50 % and 90 % of "
            "what a patch takes.",
        ),
    ]  # fmt: skip
    training = [
        Entry(
            "Curves of a run", "train_curves.png",
            "Training and validation drifting apart is overfitting; augmented images are harder, "
            "so training may look worse than validation.",
            TRAIN, "runs/mine/curves.png",
            lambda _: _viz("training").draw_curves(_result("training_cifar.json")["curve"]),
        ),
        Entry(
            "Confusion", "train_confusion.png",
            "A row is what images of one class were taken for: right ones lie on the diagonal, "
            "and a dark cell elsewhere is a pair of classes that the model mixes up.",
            TRAIN, "runs/mine/val_confusion.png", _left("val_confusion.png"),
        ),
        Entry(
            "Tendency while training", "train_tendency.jpg",
            "Arrows as in the responsive field, for the first, the middle and the last layer, "
            "on one scale.",
            TRAIN + " --config.interactions.every=200", "TensorBoard, interactions/*_arrows",
            _tendency,
        ),
        Entry(
            "Windows while training", "train_windows.jpg",
            "Each row is an image and each column a layer: solid boxes should close in on the "
            "dashed ones that they learn from (here after 24 steps).",
            TRAIN + " --config.winft.windows=predicted", "runs/mine/windows.png",
            _left("windows.png", shrink=2),
        ),
        Entry(
            "Arms of a comparison", "train_arms.png",
            "One line an arm, the mean of its runs, with the last accuracy and the number of runs "
            "in the legend, best first (one run each says nothing of chance).",
            "python tools/compare_windows.py --data DIR --out runs", "runs/curves.png", _arms,
        ),
    ]  # fmt: skip
    return {
        "One image": analysis,
        "Verification": verification,
        "A data set": statistics,
        "Training": training,
    }


def page() -> str:
    """The page, as Markdown."""
    parts = [
        "# Gallery",
        "One figure of each kind, and the command that makes it of your own data. All numbers are "
        "real: the embedded model on embedded photographs, and the runs in [results.md]"
        "(results.md). Colours mean the same in every figure: each indicator has its own, controls "
        "are grey, and in maps lighter is more (white to blue: darker is more). This page is made "
        "by `python tools/gallery.py`.",
    ]
    for section, some in entries().items():
        parts.append(f"## {section}")
        for entry in some:
            made = f"```bash\n{entry.command}   # {entry.leaves}\n```"
            picture = f"![{entry.title}](images/gallery/{entry.file})"
            parts += [f"### {entry.title}", entry.says, picture, made]
    folded = (part if part[0] in "#!`" else textwrap.fill(part, 110) for part in parts)
    return "\n\n".join(folded) + "\n"


def _draw(some: list[Entry], work: Work) -> None:
    from vit_interact.viz.png import FLAT, save

    PICTURES.mkdir(parents=True, exist_ok=True)
    for entry in some:
        path = save(entry.draw(work), PICTURES / entry.file, FLAT[1:], MOST)
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes", flush=True)
    known = {entry.file for section in entries().values() for entry in section}
    for left in PICTURES.iterdir():
        if left.name not in known:
            left.unlink()
    total = sum(path.stat().st_size for path in PICTURES.iterdir())
    print(f"{len(known)} kinds of figures, {total:,} bytes")


def main() -> None:
    """Draws the pictures and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keep what figures are drawn from in this folder")
    parser.add_argument("--only", help="draw only these pictures, such as field,verify_removal")
    arguments = parser.parse_args()
    everything = [entry for section in entries().values() for entry in section]
    stems = {Path(entry.file).stem for entry in everything}
    chosen = set(arguments.only.split(",")) if arguments.only else stems
    if unknown := chosen - stems:
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {', '.join(sorted(stems))}")
    with tempfile.TemporaryDirectory() as folder:
        work = Work((arguments.work or Path(folder)).resolve())
        _draw([entry for entry in everything if Path(entry.file).stem in chosen], work)
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
