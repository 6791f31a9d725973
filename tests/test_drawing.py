"""Processes that draw: not there longer than somebody needs them."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from vit_interact import drawing
from vit_interact.drawing import renderer

several_cores = pytest.mark.skipif((os.cpu_count() or 1) == 1, reason="one core draws by itself")


@several_cores
@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("fails", [False, True])
def test_workers_that_nobody_needs_are_ended(monkeypatch, platform, fails):
    """Where options are wrong, or another run has done everything."""
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(drawing.sys, "platform", platform)
    before, seen = set(multiprocessing.active_children()), []
    try:
        with renderer(1):
            seen = [child for child in multiprocessing.active_children() if child not in before]
            if fails:
                raise ValueError("wrong options")
    except ValueError:
        assert fails
    # On Linux they begin when there is something to draw.
    assert len(seen) == (0 if platform == "linux" else min(os.cpu_count(), 7))
    assert not any(child.is_alive() for child in seen)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
def test_what_imports_for_the_workers_ends_with_the_command():
    """Whatever it is doing: a pipe would wait for it."""
    child = (
        "import time\nfrom vit_interact.processes import end_with_parent_at_once\n"
        "end_with_parent_at_once()\nprint('ready', flush=True)\ntime.sleep(120)"
    )
    parent = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\nsys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    # All of its output has come when nobody has the pipe open any more.
    assert process.communicate("end\n", timeout=30) == ("", None)
