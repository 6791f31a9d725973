"""Long commands are really killed, several times, and go on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import vit_interact as vi
from tests.data.photographs import photographs
from tests.models.helpers import tiny
from vit_interact.data.preprocess import Preprocess
from vit_interact.survey import load_survey


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    model, params, _ = tiny(num_classes=2)
    weights = folder / "tiny.safetensors"
    vi.export_timm(
        model, params, weights, preprocess=Preprocess(size=(12, 16)), class_names=("cat", "dog")
    )
    data = photographs(folder / "data", each=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT_INTERACT_COMPILE_CACHE", str(folder / "programs"))
        yield ["--model", str(weights), "--data", str(data), "--batch-size", "2"]


def killed_often(command, progress, kills=3):
    """Runs a command until it ends by itself, killing it whenever it has gone on a little."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    rng, before = random.Random(0), 0
    for kill in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "vit_interact.cli", *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while kill < kills and process.poll() is None and progress() <= before:
            time.sleep(0.01)
        if kill < kills and process.poll() is None:
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        assert process.returncode in (0, -signal.SIGKILL), output
        assert progress() >= before
        before = progress()
    assert process.returncode == 0, output


@pytest.mark.slow
def test_verify_survives_kills(tmp_path, common):
    options = ["--indicators", "attention", "--coverages", "0.5", "--interventions", "drop"]
    reports = []
    for name, kills in (("whole", 0), ("killed", 3)):
        out = tmp_path / name
        command = ["verify", *common, *options, "--out", str(out)]
        killed_often(command, lambda out=out: len(list(out.glob("parts/*.npz"))), kills)
        report = json.loads((out / "verify.json").read_text())
        reports.append({key: report[key] for key in ("base", "windows", "removal", "removal_auc")})
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_statistics_survive_kills(tmp_path, common):
    found = []
    for name, kills in (("whole", 0), ("killed", 3)):
        out = tmp_path / f"{name}.zarr"
        command = ["statistics", *common, "--resume", "--save-every", "0", "--out", str(out)]

        def images(out=out, seen=[0]):  # noqa: B006
            try:
                about = json.loads((out / "zarr.json").read_text())["attributes"]["about"]
            except FileNotFoundError:  # nothing yet, or between two renames
                return seen[-1]
            seen.append(json.loads(about)["images"])
            return seen[-1]

        killed_often(command, images, kills)
        found.append(load_survey(out)[1])
    for name in found[0]:
        for field in ("count", "mean", "m2", "histogram"):
            values = [getattr(statistics[name], field) for statistics in found]
            if values[0] is not None:
                np.testing.assert_array_equal(*values)
