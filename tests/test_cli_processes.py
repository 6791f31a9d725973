"""Commands as processes: killed, interrupted, and started again."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

from tests.cli_data import photographs, tiny_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.slow
def test_killed_runs_lose_nothing_that_was_done(tmp_path, weights):
    """kill -9 at random moments, then the same command: equal to an uninterrupted run."""
    images = photographs(tmp_path / "in", 13)  # enough for figures in other processes
    command = [sys.executable, "-m", "vit_interact.cli", "analyze", str(images), "--model",
               str(weights), "--batch-size", "2", "--out"]  # fmt: skip
    started = time.time()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    took = time.time() - started
    dice, out = random.Random(0), tmp_path / "killed"
    kept = []
    for _ in range(6):
        process = subprocess.Popen([*command, str(out)], stdout=-3, stderr=-3)
        try:
            process.wait(took * dice.uniform(0.4, 0.95))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        progress = out / "progress.json"
        kept.append(len(json.loads(progress.read_text())["done"]) if progress.exists() else 0)
    assert kept == sorted(kept) and max(kept) > 0
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    whole, killed = (
        xr.open_zarr(folder / "analysis.zarr").load() for folder in (tmp_path / "whole", out)
    )
    # Chunks of another run may start elsewhere, so batches differ; results don't.
    xr.testing.assert_allclose(whole, killed, rtol=1e-4, atol=1e-6)
    shutil.rmtree(tmp_path / "whole")


def has_children(process):
    """Whether it has started another process."""
    parents = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents.append(int(status.read_text().rpartition(")")[2].split()[1]))
    return process in parents


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sees processes in /proc")
@pytest.mark.parametrize("seconds", [0, 0.3, 1.5, 4])  # JAX comes in, then images are analysed
def test_interrupted_while_workers_start_it_says_so_and_no_more(tmp_path, weights, seconds):
    command = [sys.executable, "-m", "vit_interact.cli", "analyze", str(tmp_path / "in"), "--model",
               str(weights), "--out", str(tmp_path / "out")]  # fmt: skip
    photographs(tmp_path / "in", 1)
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not has_children(run.pid):
        time.sleep(0.02)
    time.sleep(seconds)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 130, said
    assert "interrupted" in said and "Traceback" not in said


@pytest.mark.slow
def test_demo(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "vit_interact.cli", "demo", "--out", str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    top1 = float(re.search(r"photographs: ([\d.]+)%", found.stdout).group(1))
    assert top1 > 90
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 48


@pytest.mark.slow
def test_programs_of_a_batch_are_kept(tmp_path, weights):
    """Such as sort images' patches, which XLA cannot write once they have run."""
    photographs(tmp_path / "in", 3)
    environment = {**os.environ, "VIT_INTERACT_COMPILE_CACHE": str(tmp_path / "programs")}
    command = [sys.executable, "-m", "vit_interact.cli", "analyze", str(tmp_path / "in"), "--model",
               str(weights), "--out"]  # fmt: skip
    for out in ("first", "second"):
        ran = subprocess.run([*command, str(tmp_path / out)], env=environment, check=True,
                             capture_output=True, text=True)  # fmt: skip
        assert "Warning" not in ran.stderr
        kept = [path.name for path in tmp_path.glob("programs/*/*.program")]
        assert sum(name.startswith("_analyze_") for name in kept) == 1
    one, two = (
        xr.open_zarr(tmp_path / out / "analysis.zarr").load() for out in ("first", "second")
    )
    xr.testing.assert_identical(one, two)
