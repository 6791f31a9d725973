"""What all benchmarks share: options, timing by turns, the setting, tables and JSON.

A benchmark is a list of rows, each a flat dict of figures. `Report.show` prints them as a table or,
with `--json`, as one JSON object, which `tools/benchmark_tables.py` turns into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_interact.heap import keep_freed_memory

Row = dict[str, Any]

TURN_SECONDS = 0.1
"""How long a turn of `take_turns` is on an accelerator, at least."""


def make_parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns that are timed")
    return parser


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: names with commas between them, all known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        wrong = [name for name in names if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}: expected some of {','.join(known)}")
        return names

    return parse


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def add_no_peer(parser: argparse.ArgumentParser) -> None:
    """Adds `--no-peer`; see `has_peer`."""
    parser.add_argument("--no-peer", action="store_true", help="without PyTorch")


def has_peer(options: argparse.Namespace) -> bool:
    """Whether PyTorch takes part; says how to get it where it is missing.

    It then shares a GPU's memory with us, of which jax would take three quarters at its start.
    """
    if options.no_peer:
        return False
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = importlib.util.find_spec("transformers") is not None
    if not found:
        print('PyTorch is not here: pip install -e ".[bench]"', file=sys.stderr)
    return found


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Adds `--measure NAME=VALUE`, given any number of times: arguments of `vi.measure`."""
    parser.add_argument(
        "--measure", action="append", default=[], type=_argument, metavar="NAME=VALUE",
        help="an argument of vi.measure, such as layers=(0,5)",
    )  # fmt: skip


def _argument(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call in each turn.

    Attributes:
      wall: by the clock.
      cpu: of all threads of this process. Other programs that share the cores stretch it far less
        than the clock, so on a busy machine its ratios are the ones to trust; where an accelerator
        computes it says nothing.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median by the clock."""
        return float(np.median(self.wall))

    @property
    def cpu_seconds(self) -> float:
        """Median of the processor's time."""
        return float(np.median(self.cpu))

    def ratio(self, base: Times) -> float:
        """Median over turns of the clock's ratio to `base` in the same turn."""
        return float(np.median(np.divide(self.wall, base.wall)))

    def cpu_ratio(self, base: Times) -> float:
        """The same of the processor's time."""
        return float(np.median(np.divide(self.cpu, base.cpu)))


def take_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, pause: float = 0.0
) -> dict[str, Times]:
    """Times calls one after the other, again and again, so that all meet the same disturbances.

    On an accelerator a turn makes a call often enough to take `TURN_SECONDS`, and waits once: one
    call alone would mostly wait for its own start, which others hide behind what runs already.

    Args:
      calls: what to time; a result that holds JAX arrays is waited for, and PyTorch's GPU is.
      repeats: turns that count; one before them warms up.
      pause: seconds between calls, for threads of another library to fall asleep.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    times = {name: 1 if jax.default_backend() == "cpu" else _often(calls[name]) for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            time.sleep(pause)
            began, used = time.perf_counter(), time.process_time()
            _call(call, times[name])
            if turn:
                wall[name].append((time.perf_counter() - began) / times[name])
                cpu[name].append((time.process_time() - used) / times[name])
    return {name: Times(tuple(wall[name]), tuple(cpu[name])) for name in calls}


def _often(call: Callable[[], Any]) -> int:
    """How often a call is to be made in a turn on an accelerator."""
    _call(call, 2)  # compiles, and tunes
    began = time.perf_counter()
    _call(call, 2)
    return math.ceil(2 * TURN_SECONDS / (time.perf_counter() - began))


def _call(call: Callable[[], Any], times: int) -> None:
    result = None
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def random_params(model: Any) -> Any:
    """Parameters of a `ViT` as it begins, but made by NumPy: `init` takes long to compile."""
    images = jax.ShapeDtypeStruct((1, *model.config.image_size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        numbers = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jax.numpy.asarray(numbers + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def temporary_mib(compiled: Any) -> float:
    """Temporary memory of a compiled program by `memory_analysis`, MiB."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes / 2**20 if memory else float("nan")


def setting(*packages: str) -> Row:
    """The machine and the versions that figures depend on."""
    versions = {}
    for package in ("jax", "jaxlib", "numpy", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        # Above the number of cores, others were using them too.
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    """The processor's name and its widest vector unit that matters."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    units = ("amx_tile", "avx512f", "avx2")
    wide = next((unit for unit in units if unit in text), platform.machine())
    return f"{name.group(1) if name else platform.machine()}, {wide}"


@dataclasses.dataclass
class Report:
    """Rows of figures and what they were measured on.

    Attributes:
      name: of the benchmark, as in `python -m benchmarks.NAME`.
      fixed: settings that hold for every row, such as sizes and dtype.
      packages: whose versions matter beside those of jax and numpy.
      rows: flat dicts.
    """

    name: str
    fixed: Row
    packages: tuple[str, ...] = ()
    rows: list[Row] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        keep_freed_memory()  # as our commands do; for peers, too
        self.setting = setting(*self.packages)

    def add(self, **row: Any) -> None:
        """Adds a row, and says so on stderr: benchmarks take minutes."""
        self.rows.append(row)
        print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), file=sys.stderr)

    def to_dict(self) -> Row:
        """All of it, JSON-safe."""
        command = " ".join(["python -m", f"benchmarks.{self.name}", *_arguments()])
        return {
            "benchmark": self.name,
            "command": command,
            "date": datetime.date.today().isoformat(),
            **self.setting,
            **self.fixed,
            "rows": self.rows,
        }

    def show(self, as_json: bool) -> None:
        """Prints the table with its setting, or the JSON object."""
        found = self.to_dict()
        if as_json:
            print(json.dumps(found, indent=1))
            return
        rows = found.pop("rows")
        versions = found.pop("versions")
        print(", ".join(f"{name} {value}" for name, value in (found | versions).items()))
        print("\n".join(text_table(rows)))


def add_growth(rows: Sequence[Row], column: str) -> None:
    """Adds the exponent with which `column` grows with `patches` from row to row."""
    for before, row in itertools.pairwise(rows):
        more = math.log(row["patches"] / before["patches"])
        row["growth"] = math.log(row[column] / before[column]) / more


def _arguments() -> list[str]:
    return [argument for argument in sys.argv[1:] if argument != "--json"]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Columns of all rows, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def shown(value: Any) -> str:
    """A figure for people: three digits that say something."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def text_table(rows: Sequence[Row]) -> list[str]:
    """Lines of an aligned table."""
    columns = columns_of(rows)
    cells = [columns, *([shown(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
