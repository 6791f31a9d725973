"""`python -m vit_interact.train`: really killed, in several processes, and given bad input."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.train import tiny
from vit_interact.train.log import read_lines

HERE = tiny.__file__
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))


def command(workdir, source, *more):
    flags = [f"--config={HERE}", f"--workdir={workdir}", f"--config.data.source={source}"]
    return [sys.executable, "-m", "vit_interact.train", *flags, *more]


def start(workdir, source, *flags, devices=1):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
        "VIT_INTERACT_COMPILE_CACHE": str(source.parent / "programs"),
    }  # fmt: skip
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        command(workdir, source, *flags), env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def losses(workdir):
    lines = read_lines(workdir / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def checkpoints(workdir):
    """Steps with a whole checkpoint, without opening them: a run is writing more."""
    return [
        int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--config.batch_size=65",), "more than the 64 images"),
        (("--config.optimizer.name=adam",), "expected one of adamw, sgd, lion"),
        (("--config.data.source=/nowhere",), "/nowhere: expected"),
        (("--config.optimizer.wieght=1",), "no setting is called 'wieght'"),
        (("--config.epochs=ten",), "could not convert string to float: 'ten'"),
        (("--workdir=/proc/nowhere",), "--workdir /proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_a_status(tmp_path, source, flags, words):
    process = start(tmp_path / "run", source, *flags)
    output = process.communicate(timeout=55)[0]
    assert process.returncode == 1, output
    [line] = [line for line in output.splitlines() if "error" in line]
    assert line.startswith("error: ") and words in line
    assert "Traceback" not in output


def test_help_has_examples():
    found = subprocess.run(
        [sys.executable, "-m", "vit_interact.train", "--help"],
        capture_output=True, text=True, cwd=ROOT, timeout=55, check=False,
    )  # fmt: skip
    assert "--config=configs/" in found.stdout and "Ctrl-C" in found.stdout


@pytest.mark.skipif(os.name == "nt", reason="signals of a terminal")
@pytest.mark.parametrize(  # with settings read, and much later
    "last", ["jax", pytest.param("tensorstore", marks=pytest.mark.slow)]
)
def test_interrupted_while_it_comes_in_it_says_so_and_no_more(tmp_path, source, last):
    # A shell ignores Ctrl-C for what it starts in the background, and this might be.
    hook = f"""
import signal, sys, runpy
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupts:
    def find_spec(self, name, *_):
        if name == {last!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
sys.argv = sys.argv[1:]
runpy.run_module("vit_interact.train", run_name="__main__", alter_sys=True)
"""
    _, _, *given = command(tmp_path, source)
    run = subprocess.run(
        [sys.executable, "-c", hook, *given],
        capture_output=True, text=True, cwd=ROOT, timeout=55, check=False,
    )  # fmt: skip
    assert run.returncode == 130 and "interrupted" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
def test_kills_change_nothing(tmp_path, source):
    flags = (
        "--config.steps=60", "--config.checkpoint.every=7", "--config.eval.every=20",
        "--config.data.workers=2", "--config.model.fields.dropout=0.1", "--config.ema=0.9",
        "--config.checkpoint.keep_last=3",
    )  # fmt: skip
    whole = start(tmp_path / "whole", source, *flags)
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, 61))

    killed, generator, seen = tmp_path / "killed", random.Random(1), 0
    for kill in range(4):
        process = start(killed, source, *flags)
        last = max(losses(killed), default=0)
        # The first may come before any checkpoint; were all to, nothing would be gone on from.
        while process.poll() is None and (
            max(losses(killed), default=0) in (0, last) or (kill and not checkpoints(killed))
        ):
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        output = process.communicate(timeout=20)[0]  # ends only when the workers have ended, too
        seen += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), output
    assert seen >= 3
    process = start(killed, source, *flags)
    output = process.communicate()[0]
    assert process.returncode == 0 and "going on from step" in output, output
    assert losses(killed) == expected
    figures = [json.loads((run / "val.json").read_text()) for run in (tmp_path / "whole", killed)]
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "windows"), [("replicate", "predicted"), ("fsdp", "")])
def test_two_processes_are_one(tmp_path, source, strategy, windows):
    flags = (
        f"--config.sharding.strategy={strategy}", "--config.eval.every=3",
        f"--config.winft.windows={windows}", "--config.winft.every=4",
    )  # fmt: skip
    one = start(tmp_path / "one", source, *flags, devices=4)
    output = one.communicate()[0]
    assert one.returncode == 0, output
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = [
        start(
            tmp_path / "two", source, *flags, f"--coordinator={address}", "--processes=2",
            f"--process={number}", devices=2,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-4), step
    one, two = (json.loads((tmp_path / run / "val.json").read_text()) for run in ("one", "two"))
    assert one["examples"] == two["examples"] == 20 and one["accuracy"] == two["accuracy"]


@pytest.mark.slow
def test_profiles_and_compiled_programs_are_kept(tmp_path, source):
    flags = (
        "--config.profile.first=2", "--config.profile.steps=2",
        f"--config.compile_cache={tmp_path / 'cache'}",
    )  # fmt: skip
    process = start(tmp_path / "run", source, *flags)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "cache").iterdir())
    assert "Transformer/encoderblock_0" in (tmp_path / "run" / "parameters.txt").read_text()
