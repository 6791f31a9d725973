"""The command line: `vit-interact analyze | demo | models | convert`. Thin; imports lazily."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from vit_interact.models.weights import Checkpoint
    from vit_interact.session import Outcome

DEFAULT_MODEL = "vit_s14_caltech101"
SOME_FAILED = 3

app = typer.Typer(
    help="See which image patch affects which in a Vision Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `vit-interact`."""
    app()


def _version(asked: bool) -> bool:
    if asked:
        from vit_interact import __version__

        print(f"vit-interact {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _fail(message: object) -> NoReturn:
    """One line to stderr and exit code 1."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(1)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Bad input and full disks become one line, never a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; finished images are kept: run it again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        _fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail("the device has too little memory: try a smaller --batch-size or fewer --layers")


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with ETA on stderr; it says `compiling` until the first images are through."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{what} (compiling first)", total=total)

        def advance(images: int) -> None:
            progress.update(task, advance=images, description=what if images else None)

        yield advance


def _load(model: str, **settings: Any) -> Checkpoint:
    """Loads weights and prints what they are and what was assumed."""
    from vit_interact.models.weights import load_checkpoint

    checkpoint = load_checkpoint(model, **settings)
    config = checkpoint.model.config
    print(
        f"{checkpoint.source}: {config.count_parameters() / 1e6:.1f} M parameters, "
        f"{config.layout.rows}x{config.layout.cols} patches, {config.depth} layers, "
        f"{config.heads} heads"
    )
    print(f"  preprocessing: {checkpoint.preprocess.describe()}")
    for note in checkpoint.notes:
        print(f"  {note}")
    return checkpoint


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
    names, outputs = checkpoint.class_names or (), checkpoint.model.config.num_classes
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


@app.command(
    epilog="Examples:\n\n"
    "vit-interact analyze cat.jpg dog.png\n\n"
    "vit-interact analyze photos/ --model google/vit.safetensors --indicator edge --out cats\n\n"
    "vit-interact analyze 'photos/**/*.jpg' --model hf:facebook/dinov2-small --layers 0,5,11"
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
            help="attention, dispersion, value_norm, gradient, leave_one_out, edge or rollout."
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
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("vit-interact-out"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an analysis made with other options.")
    ] = False,
) -> None:
    """Measure images and draw what was found.

    The output folder holds [bold]analysis.zarr[/bold] (open it with xarray), figures of every
    image, a contact sheet and [bold]index.html[/bold]. The same command again goes on where it
    stopped. Exit code 3: some images failed; 1: all did, or the input was wrong.
    """
    with _one_line_errors():
        from vit_interact.data.images import find_images
        from vit_interact.session import Options

        files = find_images(images)
        _check_options(indicator, coverage)
        chosen = _parse_layers(layers)
        checkpoint = _load(model, image_size=image_size, arch=arch)
        options = Options(indicator, coverage, chosen, _parse_score(score, checkpoint))
        outcome = _analyze(checkpoint, files, out, options, batch_size, overwrite)
    _report(outcome, checkpoint, out)


def _check_options(indicator: str, coverage: float) -> None:
    """What can be said before weights are read and anything is compiled."""
    from vit_interact.interactions.indicators import check_name

    check_name(indicator)
    if not 0 < coverage <= 1:
        raise ValueError(f"--coverage {coverage}: expected a share in (0, 1]")


def _analyze(
    checkpoint: Checkpoint, files: list[Path], out: Path, options: Any, batch_size: int,
    overwrite: bool,
) -> Outcome:  # fmt: skip
    from vit_interact.session import analyze_folder

    with _progress("analysing", len(files)) as advance:
        return analyze_folder(checkpoint, files, out, options, batch_size, overwrite, advance)


def _report(outcome: Outcome, checkpoint: Checkpoint, out: Path) -> None:
    """Tables of predictions and failures; ends the command with its exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if outcome.dataset is not None:
        table = Table("image", "area of windows")
        if checkpoint.model.config.has_classes:
            table.add_column("prediction")
            table.add_column("probability", justify="right")
        data = outcome.dataset[["prediction", "probability", "combined_area"]].load()
        for index in range(min(40, data.sizes["image"])):
            one = data.isel(image=index)
            name, area = str(one["image"].values), float(one["combined_area"].mean())
            row = [escape(name), f"{area:.0%}"]
            if checkpoint.model.config.has_classes:
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
    print(told + (f"; open {out / 'index.html'}" if outcome.dataset is not None else ""))
    if outcome.failures:
        raise typer.Exit(SOME_FAILED if outcome.done + outcome.skipped else 1)


@app.command(epilog="Example:\n\nvit-interact demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("vit-interact-demo"),
    limit: Annotated[int, typer.Option(help="Embedded photographs to analyse, 1 to 202.")] = 8,
) -> None:
    """Analyse photographs that come with the package, with the model that comes with it.

    Prints top-1 over the 202 embedded test photographs of Caltech-101 and leaves the folder that
    [bold]analyze[/bold] leaves.
    """
    with _one_line_errors():
        from vit_interact.data.samples import sample_images
        from vit_interact.session import Options

        samples = sample_images()
        files = [sample.path for sample in sample_images(limit)]
        checkpoint = _load(DEFAULT_MODEL)
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
    with _progress("classifying", len(samples)) as advance:
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            pictures = [checkpoint.preprocess.picture(read_image(s.path)) for s in chunk]
            # The last batch is padded, so that one program serves all.
            padded = np.stack(pictures + pictures[:1] * (batch_size - len(chunk)))
            guesses = np.asarray(predict(checkpoint.params, padded))
            right += sum(names[g] == s.label for g, s in zip(guesses, chunk, strict=False))
            advance(len(chunk))
    return right


@app.command(epilog="Examples:\n\nvit-interact models\n\nvit-interact models --json")
def models(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the architectures that can be created by name."""
    import json

    from vit_interact.models.zoo import list_models, model_config

    rows: list[dict[str, Any]] = []
    for name in list_models():
        config = model_config(name)
        rows.append(
            {
                "name": name,
                "parameters": config.count_parameters(),
                "image_size": list(config.image_size),
                "patch_size": list(config.patch_size),
                "layers": config.depth,
                "heads": config.heads,
                "width": config.width,
                "prefix_tokens": config.prefix,
                "outputs": config.num_classes,
            }
        )
    if json_:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for head in ("params", "image", "patch", "layers", "heads", "outputs"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"], f"{row['parameters'] / 1e6:.1f} M", str(row["image_size"][0]),
            str(row["patch_size"][0]), str(row["layers"]), str(row["heads"]),
            str(row["outputs"] or "features"),
        )  # fmt: skip
    Console().print(table)
    print(f"weights that come with the package: {DEFAULT_MODEL}")


@app.command(
    epilog="Examples:\n\n"
    "vit-interact convert ViT-B_16.npz vit_b16.safetensors\n\n"
    "vit-interact convert hf:facebook/deit-small-patch16-224 deit.safetensors --dtype float16"
)
def convert(
    source: Annotated[str, typer.Argument(help="Anything that --model takes.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write (timm names).")],
    image_size: Annotated[int | None, typer.Option(help="Resize positions to this size.")] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture when the file is unclear.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert weights to timm-named safetensors, preprocessing and class names included."""
    with _one_line_errors():
        if target.suffix != ".safetensors":
            raise ValueError(f"{target}: the file to write must end in .safetensors")
        if target.exists() and not force:
            raise ValueError(f"{target} exists; --force replaces it")
        from vit_interact.models.weights import export_timm

        loaded = _load(source, image_size=image_size, arch=arch)
        export_timm(
            loaded.model, loaded.params, target,
            preprocess=loaded.preprocess, class_names=loaded.class_names, dtype=dtype,
        )  # fmt: skip
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
