"""What all commands share: errors of one line, progress, loading weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from vit_interact.models.weights import Checkpoint

DEFAULT_MODEL = "vit_s14_caltech101"

app = typer.Typer(
    help="See which image patch affects which in a Vision Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(message: object) -> NoReturn:
    """One line to stderr and exit code 1."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(1)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input and full disks become one line, never a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; finished images are kept: run it again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail("the device has too little memory: try a smaller --batch-size or fewer --layers")


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[float], None]]:
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{what} (compiling first)", total=total)

        def advance(images: float | int) -> None:
            bar.update(task, advance=images, description=what if images else None)

        yield advance


def load(model: str, **settings: Any) -> Checkpoint:
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
