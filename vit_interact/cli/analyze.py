"""`vit-interact analyze` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vit_interact.cli.shell import (
    DEFAULT_MODEL,
    Dtype,
    among,
    command,
    load,
    names_of,
    one_line_errors,
    progress,
)
from vit_interact.viz.stems import TITLES

if TYPE_CHECKING:
    from vit_interact.drawing import Render
    from vit_interact.models.weights import Checkpoint
    from vit_interact.session import Options, Outcome

SOME_FAILED = 3


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers {text!r}: expected numbers such as 0,5,11") from None


def _parse_score(text: str, checkpoint: Checkpoint) -> str | int:
    """`predicted`, a class name or a class number."""
    if text == "predicted":
        return text
    config = checkpoint.model.config
    names, outputs = checkpoint.class_names or (), config.num_classes or config.width
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < outputs:
        return int(text)
    import difflib

    near = difflib.get_close_matches(text, names, n=3)
    known = f" (did you mean {', '.join(near)}?)" if near else ""
    raise ValueError(
        f"--score {text!r}: expected 'predicted', a class number below {outputs}"
        + (" or a class name" if names else "") + known
    )  # fmt: skip


def _figures_of(text: str) -> tuple[str, ...]:
    """Stems of the figures to draw."""
    names = among("--figures", text, ("all", "none", *TITLES))
    return tuple(TITLES if "all" in names else (name for name in names if name != "none"))


@command(
    "vit-interact analyze cat.jpg dog.png",
    "vit-interact analyze photos/ --model google/vit.safetensors --indicator edge --out cats",
    "vit-interact analyze 'photos/**/*.jpg' --model hf:facebook/dinov2-small --layers 0,5,11",
    "vit-interact analyze photos/ --figures none --out arrays",
)
def analyze(
    images: Annotated[list[str], typer.Argument(help="Files, folders or glob patterns.")],
    model: Annotated[
        str,
        typer.Option(help="Weights: .npz, .safetensors, a folder, hf:owner/name, or embedded."),
    ] = DEFAULT_MODEL,
    indicator: Annotated[
        str,
        typer.Option(
            help="attention, dispersion, value_norm, gradient, leave_one_out, edge or rollout; or "
            "several such as edge,attention: figures are of the first, the report shows all."
        ),
    ] = "leave_one_out",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers such as 0,5,11 (negative from the end); all if unset."),
    ] = None,
    coverage: Annotated[
        float, typer.Option(help="Share of a patch's impact that its window holds, in (0, 1].")
    ] = 0.9,
    score: Annotated[
        str, typer.Option(help="What gradients are of: predicted, a class name or number.")
    ] = "predicted",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side; positions are resized to it.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture when the file does not tell it all.")
    ] = None,
    dtype: Dtype = "float32",
    figures: Annotated[
        str,
        typer.Option(
            help="PNG files of every image: all, none, or some of "
            f"{', '.join(TITLES)}. They take longer than measuring; the report has its own."
        ),
    ] = "all",
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("vit-interact-out"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an analysis made with other options.")
    ] = False,
) -> None:
    """Measure images and draw what was found.

    The output folder holds [bold]report.html[/bold] (interactive, one file that works offline),
    [bold]analysis.zarr[/bold] (open it with xarray), figures of every image, a contact sheet and
    [bold]index.html[/bold]. The same command again goes on where it
    stopped. Exit code 3: some images failed; 1: all did, or the input was wrong.
    """
    with one_line_errors():
        from vit_interact.data.images import find_images
        from vit_interact.drawing import renderer
        from vit_interact.session import Options

        stems = _figures_of(figures)
        files = find_images(images)
        # Others import Matplotlib while JAX comes in here.
        with renderer(len(files), stems) as render:
            first, *others = names_of(indicator)
            if not 0 < coverage <= 1:
                raise ValueError(f"--coverage {coverage}: expected a share in (0, 1]")
            chosen = _parse_layers(layers)
            checkpoint = load(model, image_size=image_size, arch=arch, dtype=dtype)
            scored = _parse_score(score, checkpoint)
            options = Options(first, coverage, chosen, scored, tuple(others))
            _check_score(options, checkpoint)
            outcome = _analyze(
                checkpoint, files, out, options, batch_size, overwrite, render, stems
            )
    _report(outcome, checkpoint, out)


def _check_score(options: Options, checkpoint: Checkpoint) -> None:
    """Without classes nothing is predicted that a gradient could be of."""
    from vit_interact.interactions.indicators import NEEDS

    if checkpoint.model.config.has_classes or options.score != "predicted":
        return
    graded = [n for n in (options.indicator, *options.others) if "output_grad" in NEEDS[n]]
    if graded:
        raise ValueError(
            f"{graded[0]} is about a score, and these weights have no classes: choose "
            "another --indicator, or one output by --score NUMBER"
        )


def _analyze(
    checkpoint: Checkpoint, files: list[Path], out: Path, options: Any, batch_size: int,
    overwrite: bool, render: Render | None = None, figures: tuple[str, ...] = tuple(TITLES),
) -> Outcome:  # fmt: skip
    from vit_interact.session import analyze_folder

    with progress("analysing", len(files)) as advance:
        return analyze_folder(
            checkpoint, files, out, options, batch_size, overwrite, advance, render, figures
        )


def _report(outcome: Outcome, checkpoint: Checkpoint, out: Path) -> None:
    """Tables of predictions and failures; ends the command with its exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if outcome.dataset is not None:
        table = Table("image", "area of windows")
        guesses = [name for name in ("prediction", "probability") if name in outcome.dataset]
        if guesses:
            table.add_column("prediction")
            table.add_column("probability", justify="right")
        data = outcome.dataset[["combined_area", *guesses]].load()
        for index in range(min(40, data.sizes["image"])):
            one = data.isel(image=index)
            name, area = str(one["image"].values), float(one["combined_area"].mean())
            row = [escape(name), f"{area:.0%}"]
            if guesses:
                number = int(one["prediction"][0])
                names = checkpoint.class_names
                row += [escape(names[number]) if names else f"class {number}",
                        f"{float(one['probability'][0]):.1%}"]  # fmt: skip
            table.add_row(*row)
        console.print(table)
        if data.sizes["image"] > 40:
            console.print(f"... and {data.sizes['image'] - 40} more in {out / 'index.html'}")
    if outcome.failures:
        table = Table("not analysed", "reason")
        for name, reason in outcome.failures:
            table.add_row(escape(name), escape(reason))
        Console(stderr=True).print(table)
    told = f"{outcome.done} analysed"
    if outcome.skipped:
        told += f", {outcome.skipped} done before"
    if outcome.failures:
        told += f", {len(outcome.failures)} failed"
    if outcome.dataset is None:
        print(told)
    else:
        print(f"{told}; open {out / 'report.html'} (interactive) or {out / 'index.html'} (figures)")
        _say_left_out(outcome.dataset, out)
    if outcome.failures:
        raise typer.Exit(SOME_FAILED if outcome.done + outcome.skipped else 1)


def _say_left_out(dataset: Any, out: Path) -> None:
    from vit_interact.viz.pack import fitting

    shown, images = fitting(dataset), dataset.sizes["image"]
    if shown < images:
        print(
            f"  report.html holds the first {shown} of {images} images, to stay under 80 MB; for "
            f"others: vit-interact report {out} --images NAME --out FILE.html"
        )


@command(
    "vit-interact demo --out demo",
)
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("vit-interact-demo"),
    limit: Annotated[int, typer.Option(help="Embedded photographs to analyse, 1 to 202.")] = 8,
) -> None:
    """Analyse photographs that come with the package, with the model that comes with it.

    Prints top-1 over the 202 embedded test photographs of Caltech-101 and leaves the folder that
    [bold]analyze[/bold] leaves.
    """
    with one_line_errors():
        from vit_interact.data.samples import sample_images
        from vit_interact.session import Options

        samples = sample_images()
        files = [sample.path for sample in sample_images(limit)]
        checkpoint = load(DEFAULT_MODEL)
        right = _top1(checkpoint, samples)
        print(f"top-1 on the {len(samples)} embedded photographs: {right / len(samples):.1%} "
              f"({right} right)")  # fmt: skip
        outcome = _analyze(checkpoint, files, out, Options(), 8, False)
    _report(outcome, checkpoint, out)


def _top1(checkpoint: Checkpoint, samples: list[Any], batch_size: int = 16) -> int:
    """How many photographs get their own label."""
    import jax
    import numpy as np

    from vit_interact.data.images import read_image

    @jax.jit
    def predict(params: Any, pictures: Any) -> Any:
        images = checkpoint.preprocess.normalize(pictures)
        logits: Any = checkpoint.model.apply({"params": params}, images)
        return logits.argmax(-1)

    names, right = checkpoint.class_names or (), 0
    with progress("classifying", len(samples)) as advance:
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            pictures = [checkpoint.preprocess.picture(read_image(s.path)) for s in chunk]
            # The last batch is padded, so that one program serves all.
            padded = np.stack(pictures + pictures[:1] * (batch_size - len(chunk)))
            guesses = np.asarray(predict(checkpoint.params, padded))
            right += sum(names[g] == s.label for g, s in zip(guesses, chunk, strict=False))
            advance(len(chunk))
    return right
