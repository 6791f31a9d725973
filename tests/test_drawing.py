"""Processes that draw: not there longer than somebody needs them."""

import multiprocessing
import os
import sys

import pytest

from vit_interact.drawing import renderer


@pytest.mark.skipif((os.cpu_count() or 1) == 1, reason="one core draws by itself")
@pytest.mark.parametrize("fails", [False, True])
def test_workers_that_nobody_needs_are_ended(monkeypatch, fails):
    """Where options are wrong, or another run has done everything."""
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    before, seen = set(multiprocessing.active_children()), []
    try:
        with renderer(1):
            seen = [child for child in multiprocessing.active_children() if child not in before]
            if fails:
                raise ValueError("wrong options")
    except ValueError:
        assert fails
    assert len(seen) > 1 and not any(child.is_alive() for child in seen)
