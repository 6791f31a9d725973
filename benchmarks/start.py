"""Time from the shell's prompt to the first result, in fresh processes.

    python -m benchmarks.start [--repeats 3] [--json]

Runs `vit-interact --help`, and `vit-interact analyze` on one embedded photograph with the embedded
ViT-S/14: with an empty folder of compiled programs (`cold`) and with those of an earlier run
(`kept`). They take turns.

`first_s` is when the arrays and the figures of the image are complete on disk, which the command
records in `progress.json`; `all_s` when the process has ended, with contact sheet, report and page.
`cpu_first_s` is the processor's time of the process until then, of all threads, without the
processes that draw; `cpu_all_s` has these, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common
from vit_interact.compile_cache import VARIABLE
from vit_interact.data.samples import sample_images

_POLL = 0.01  # seconds


def run(*arguments: str, programs: Path, out: Path | None = None) -> common.Row:
    """Times one process of the command.

    Args:
      *arguments: of `vit-interact`.
      programs: folder of compiled programs.
      out: the output folder, when there is to be a first result.

    Raises:
      RuntimeError: if the command fails.
    """
    command = [sys.executable, "-m", "vit_interact.cli", *arguments]
    environment = {**os.environ, VARIABLE: str(programs)}
    _adopt()
    first: common.Row = {}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        while True:
            ended, status, used = os.wait4(process.pid, os.WNOHANG)  # and what it has waited for
            if ended:
                break
            if out is not None and not first and _has_result(out / "progress.json"):
                first = {"first_s": time.perf_counter() - began, "cpu_first_s": _cpu(process.pid)}
            time.sleep(_POLL)
        taken = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read().decode()[-2000:]}")
    return {**first, "all_s": taken, "cpu_all_s": used.ru_utime + used.ru_stime + _left_behind()}


def _adopt() -> None:
    """Has Linux give processes to this one whose own parent has ended."""
    become_subreaper = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(become_subreaper, 1)


def _left_behind() -> float:
    """Processor time of what a process has left behind, which ends by itself: those that draw."""
    seconds = 0.0
    with contextlib.suppress(ChildProcessError):
        while True:
            _, _, used = os.wait4(-1, 0)
            seconds += used.ru_utime + used.ru_stime
    return seconds


def _has_result(progress: Path) -> bool:
    """Whether the command has recorded an image; it replaces the file as a whole."""
    return progress.exists() and bool(json.loads(progress.read_text("utf-8"))["done"])


def _cpu(pid: int) -> float:
    """Processor time of a running process; NaN where there is no `/proc`."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def measure(repeats: int) -> dict[str, list[common.Row]]:
    """Rows of every turn, by kind of start."""
    image = str(sample_images(1)[0].path)
    found: dict[str, list[common.Row]] = {"--help": [], "analyze, cold": [], "analyze, kept": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def analyze(programs: str, turn: int) -> common.Row:
            out = folder / f"out-{programs}-{turn}"
            return run("analyze", image, "--out", str(out), programs=folder / programs, out=out)

        analyze("kept", 0)
        for turn in range(1, repeats + 1):
            found["--help"].append(run("--help", programs=folder / "none"))
            found["analyze, cold"].append(analyze(f"cold-{turn}", turn))
            found["analyze, kept"].append(analyze("kept", turn))
    return found


def main() -> None:
    """Runs the benchmark."""
    options = common.make_parser(__doc__, repeats=3).parse_args()
    report = common.Report("start", {"model": "vit_s14_caltech101", "images": 1})
    for what, turns in measure(options.repeats).items():
        medians = {name: float(np.median([turn[name] for turn in turns])) for name in turns[0]}
        report.add(what=what, **medians)
    report.show(options.json)


if __name__ == "__main__":
    main()
