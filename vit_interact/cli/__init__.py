"""The command line, a module for each group of commands. Thin; imports lazily."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from vit_interact.cli import analyze, models, report, statistics, verify
from vit_interact.cli.shell import app
from vit_interact.processes import (
    INTERRUPTED,
    collect_seldom,
    leave_interrupted,
    remember_interrupts,
)

__all__ = ["analyze", "app", "main", "models", "report", "statistics", "verify"]


# More objects than come in with JAX and Flax; `shell.load` has the rest counted as elsewhere.
_IMPORTED = 400_000


def main() -> None:
    """Entry point of `vit-interact`."""
    remember_interrupts()
    collect_seldom(_IMPORTED)
    try:
        app()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        leave_interrupted()
    finally:
        # Python looks for garbage once more when it ends, which takes 0.15 s.
        gc.freeze()


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
