"""Runs the benchmarks of docs/benchmarks.md and kernels.md and fills tables from their JSON files.

    python -m tools.benchmark_tables --run           # all: one to two hours on two idle cores
    python -m tools.benchmark_tables --run fields    # some, then the tables
    python -m tools.benchmark_tables                 # the tables alone
    python -m tools.benchmark_tables --check         # exit code 1 when a page is out of date

A run leaves `docs/benchmarks/NAME.json`. A page holds a pair of comments for each,
`<!-- table NAME -->` and `<!-- end -->`; what stands between them is replaced by when, on what and
by which command it was measured, and by the table. `<!-- targets FOLDER -->` is the table of
targets (tools/target_tables.py) of the files of a folder.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import columns_of, shown
from tools import target_tables

DOCS = Path(__file__).parents[1] / "docs"
PAGES, RESULTS = (DOCS / "benchmarks.md", DOCS / "kernels.md"), DOCS / "benchmarks"
_AT_1024 = ["--image-size", "1024", "--batch", "1", "--depth", "2"]


def _indicators(model: str, batches: str, repeats: int, *more: str) -> list[str]:
    command = ["indicators", "--models", model, "--batches", batches, "--repeats", str(repeats)]
    return [*command, *more]


COMMANDS: dict[str, list[str]] = {
    "indicators": _indicators("vit_s16", "1,8", 11, "--memory"),
    "indicators_32": _indicators("vit_s16", "32", 3),
    "indicators_b16": _indicators("vit_b16", "1,8", 7),
    "indicators_b16_32": _indicators("vit_b16", "32", 3),
    "indicators_518": _indicators("vit_s14@518", "1", 9, "--memory"),
    # One process has no memory for PyTorch's maps of all indicators at once, and ours.
    "indicators_518_8": _indicators(
        "vit_s14@518", "8", 5, "--indicators", "attention,leave_one_out"
    ),
    "indicators_518_8_backward": _indicators(
        "vit_s14@518", "8", 3, "--indicators", "gradient,edge"
    ),
    "indicators_518_32": _indicators(
        "vit_s14@518", "32", 3, "--indicators", "attention,leave_one_out", "--peer-forward"
    ),
    "bfloat16": _indicators("vit_s16", "1,8", 9, "--dtype", "bfloat16"),
    "blocks": ["blocks"],
    "heads": ["heads"],
    "together": ["together"],
    "fields": ["fields"],
    "windows": ["windows"],
    "windows_attention": ["windows_attention"],
    "statistics": ["statistics", "--parts", "survey,update,memory"],
    "high_resolution": ["high_resolution"],
    "memory": ["memory"],
    "memory_1024": ["memory", *_AT_1024, "--only", "leave_one_out", "edge"],
    "scaling": ["scaling"],
    "scaling_vit_b16": ["scaling", "--volume-of", "vit_b16", "--batch", "64"],
    "training": ["training"],
    "cpu": ["cpu"],
    "ynnpack": ["ynnpack"],
    "data_path": ["data_path", "--repeats", "21"],
    "viewer": ["viewer"],
    "start": ["start"],
    "analyze": ["analyze"],
    "tracing": ["tracing"],
    "one_block": ["one_block"],
}
COMPILED_ONLY = ("memory", "scaling")  # other programs on the cores change nothing there
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TARGETS = re.compile(r"(<!-- targets (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Runs what is asked for and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.run is not None:
        unknown = [name for name in options.run if name not in COMMANDS]
        if unknown:
            parser.error(f"{unknown[0]}: expected some of {', '.join(COMMANDS)}")
        for name in options.run or COMMANDS:
            run(name)
    for page in PAGES:
        text = page.read_text("utf-8")
        filled = fill(text)
        if options.check and text != filled:
            sys.exit(f"{page} is out of date: python -m tools.benchmark_tables")
        page.write_text(filled, "utf-8")


def run(name: str) -> None:
    """Runs one benchmark and keeps its JSON object."""
    module, *arguments = COMMANDS[name]
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json"]
    print(" ".join(command[1:]), file=sys.stderr)
    found = json.loads(subprocess.check_output(command, text=True))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def fill(page: str) -> str:
    """The page with every table that has a JSON file."""

    def table(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}\nNot run yet.\n\n{match[3]}"
        return f"{match[1]}\n{describe(json.loads(path.read_text('utf-8')))}\n\n{match[3]}"

    def targets(match: re.Match[str]) -> str:
        lines = target_tables.lines(RESULTS / match[2])
        return "\n".join([match[1], *lines, "", match[3]])

    return _TARGETS.sub(targets, _TABLE.sub(table, page))


def describe(found: dict[str, Any]) -> str:
    """A line about the run, and its table."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    # The benchmark before this one leaves a load of its own behind.
    busy = found["benchmark"] not in COMPILED_ONLY and found["load_before"] > max(
        1.5, found["cores"]
    )
    known = ("benchmark", "command", "date", "device", "processor", "cores", "load_before",
             "python", "versions", "rows")  # fmt: skip
    fixed = ", ".join(f"{key} {shown(value)}" for key, value in found.items() if key not in known)
    cores = "1 core" if found["cores"] == 1 else f"{found['cores']} cores"
    line = (
        f"`{found['command']}`; {found['date']}, {found['device']}, {cores} of "
        f"{found['processor']}; {versions}; {fixed}."
    )
    if busy:
        line += (
            f" **The cores were shared** (load {found['load_before']:g} before it began): trust "
            "`cpu_…` columns and memory, not the clock."
        )
    return "\n".join([line, "", *markdown(found["rows"])])


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(row.get(name)) for name in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
