"""What all commands share: errors of one line, progress, loading weights."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vit_interact.processes import INTERRUPTED, collect_seldom, stop_if_interrupted

if TYPE_CHECKING:
    from vit_interact.models.weights import Checkpoint

DEFAULT_MODEL = "vit_s14_caltech101"
# Images that may take more than two seconds to open.
_LONG = 1000

# Options that commands over a data set share.
Model = Annotated[str, typer.Option(help="Anything that analyze takes.")]
Limit = Annotated[int | None, typer.Option(help="Images to take; all if unset.")]
Skip = Annotated[
    int, typer.Option(help="Images to leave out first; their order is a hash of names.")
]
BatchSize = Annotated[int, typer.Option(help="Images at a time, over all devices.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels of a side.")]
Arch = Annotated[str | None, typer.Option(help="Architecture when unclear.")]
DTYPES = ("float32", "bfloat16")
Dtype = Annotated[
    str,
    typer.Option(
        help="What the model computes in: float32, or bfloat16: less exact, and faster on a GPU, a "
        "TPU and a CPU with AMX."
    ),
]

app = typer.Typer(
    help="See which image patch affects which in a Vision Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(*examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function a command, with its docstring and examples as its help.

    The terminal breaks the docstring's lines: typer would break them where the source does as well.
    """
    title = "Example:" if len(examples) == 1 else "Examples:"

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        text = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        told = "\n\n".join(" ".join(paragraph.split()) for paragraph in text)
        return app.command(help=told, epilog="\n\n".join((title, *examples)))(function)

    return register


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
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail("the device has too little memory: try a smaller --batch-size or fewer --layers")


@contextlib.contextmanager
def progress(
    what: str, total: int, first: str = " (compiling first)"
) -> Iterator[Callable[[float], None]]:
    """A bar with ETA on stderr; it says what comes first until the first images are through."""
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
        task, done = bar.add_task(what + first, total=total), 0.0

        def advance(images: float | int) -> None:
            nonlocal done
            stop_if_interrupted()
            done = round(done + images, 6)  # shares of an image add up to less than it
            bar.update(task, completed=done, description=what if images else None)

        yield advance


def watched(what: str) -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """A bar for going through something of known length, if it is long."""

    def watch(items: Iterable[Any], total: int) -> Iterator[Any]:
        if total < _LONG:
            yield from items
            return
        with progress(what, total, first="") as advance:
            for item in items:
                advance(1)
                yield item

    return watch


def load(model: str, dtype: str = DTYPES[0], **settings: Any) -> Checkpoint:
    """Loads weights and prints what they are and what was assumed."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    from vit_interact.compile_cache import keep_compiled
    from vit_interact.heap import keep_freed_memory
    from vit_interact.models.weights import load_checkpoint
    from vit_interact.programs import keep_programs

    collect_seldom()
    keep_freed_memory()
    keep_programs(keep_compiled())
    checkpoint = load_checkpoint(model, dtype=dtype, **settings)
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


def names_of(text: str | None) -> tuple[str, ...]:
    """Indicators from an option such as `attention,edge`; all for None."""
    from vit_interact.interactions.indicators import INDICATORS, check_name

    names = tuple(INDICATORS) if text is None else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        check_name(name)
    return names


def among(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names from an option, all of them known."""
    names = tuple(dict.fromkeys(text.split(",")))
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"{option} '{wrong[0]}': expected some of {','.join(known)}")
    return names


def numbers_of(option: str, text: str, below: bool = False) -> tuple[float, ...]:
    """Shares in (0, 1] from an option, sorted; `below` leaves out 1."""
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected numbers such as 0.5,0.9") from None
    for value in values:
        if not 0 < value <= 1 or (below and value == 1):
            raise ValueError(f"{option} {value}: expected shares in (0, 1{')' if below else ']'}")
    return values


def warn_left_out(left_out: Sequence[ValueError], shown: int = 20) -> None:
    """A line on stderr for each image that cannot be read, or for the first of many."""
    from vit_interact.data.naming import visible

    for error in left_out[:shown]:
        print(f"warning: left out {visible(str(error))}", file=sys.stderr)
    if len(left_out) > shown:
        rest = len(left_out) - shown
        print(f"warning: left out {rest} more; the results name them", file=sys.stderr)
