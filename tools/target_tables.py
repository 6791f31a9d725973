"""Tables of targets: what `benchmarks.indicators` found, beside what it was to find.

`tools.benchmark_tables` puts one between `<!-- targets FOLDER -->` and `<!-- end -->`, from the
files `indicators*.json` of that folder (`.`: of `docs/benchmarks` itself).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
# How `--models` spells a model, and its heading.
MODELS = {
    "vit_s16": "ViT-S/16",
    "vit_b16": "ViT-B/16",
    "vit_s14@518": "ViT-S/14, 518 pixels",
}
FASTER = ("leave_one_out", "gradient", "edge", "attention", "value_norm", "dispersion", "rollout")
# What temporary memory is compared with.
MEMORY = {
    "attention": "forward",
    "leave_one_out": "forward",
    "gradient": "forward + backward",
    "edge": "forward + backward",
}


class Target(NamedTuple):
    """A line of the table: `column` of `what` is to be at most `limit`."""

    title: str
    what: str
    column: str
    limit: float


TARGETS = (
    Target("forward at most 1.25 x PyTorch's SDPA", "forward", "torch_ratio", 1.25),
    Target("`attention` of all layers at most 1.10 x forward", "attention", "ratio", 1.10),
    Target("`leave_one_out` at most 1.35 x", "leave_one_out", "ratio", 1.35),
    Target("`edge` at most 3.3 x", "edge", "ratio", 3.3),
    *(Target(f"`{name}` faster than PyTorch's way", name, "torch_ratio", 1.0) for name in FASTER),
    *(Target(f"memory of `{name}` at most 1.3 x {than}", name, "memory_ratio", 1.3)
      for name, than in MEMORY.items()),
)  # fmt: skip


def read(folder: Path) -> tuple[list[str], dict[tuple[str, int, str], Row]]:
    """Days of the files of a folder, and their rows by model, batch and what was run."""
    days, rows = set(), {}
    for path in sorted(folder.glob("indicators*.json")):
        found = json.loads(path.read_text("utf-8"))
        days.add(f"{found['date']}, {found['cores']} cores of {found['processor']}")
        rows |= {(row["model"], row["batch"], row["what"]): row for row in found["rows"]}
    return sorted(days), rows


def lines(folder: Path) -> list[str]:
    """Lines of Markdown: on what and when, and the table."""
    days, rows = read(folder)
    cases = {
        model: sorted({batch for name, batch, _ in rows if name == model})
        for model in MODELS
        if any(name == model for name, *_ in rows)
    }
    batches = "; ".join(f"{MODELS[m]}: {' / '.join(map(str, b))}" for m, b in cases.items())
    table = ["", *(MODELS[model] for model in cases), "holds"]
    text = ["; ".join(days) + f". Images at a time: {batches}.", ""]
    text += [_line(table), _line(["---"] * len(table))]
    for target in TARGETS:
        values: list[float] = []
        cells = [_cell(target, [rows.get((m, b, target.what)) for b in cases[m]], values)
                 for m in cases]  # fmt: skip
        over = sum(value > target.limit for value in values)
        holds = f"**no** in {over} of {len(values)}" if over else "yes" if values else ""
        text.append(_line([target.title, *cells, holds]))
    return text


def _cell(target: Target, rows: Iterable[Row | None], values: list[float]) -> str:
    """By the clock, and in brackets by the processor's time; memory has one figure."""
    shown = []
    for row in rows:
        if row is None or row.get(target.column) is None:
            shown.append("–")
            continue
        values.append(round(row[target.column], 2))
        by_processor = row.get(f"cpu_{target.column}")
        more = f" ({by_processor:.2f})" if by_processor else ""
        shown.append(f"{row[target.column]:.2f}{more}")
    return " / ".join(shown)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
