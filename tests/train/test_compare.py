"""The tool that compares windows: it runs what is missing and says what failed."""

import argparse
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train import tiny
from vit_interact.train.config import as_json, differences

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["winft_study", "winft_caltech101"])
def test_arms_of_a_study_change_one_thing_each(name):
    study = importlib.import_module(f"configs.{name}")
    plain = as_json(study.get_config("winft"))
    for arm in set(study.ARMS) - {"vit", "winft", "local", "shifted", "random"}:
        (line,) = differences(plain, as_json(study.get_config(arm)))
        assert line.startswith("config.winft."), arm


def test_settings_may_follow_any_option(tmp_path):
    command = [
        sys.executable, "tools/compare_windows.py", "--data", str(tmp_path), "a=1", "--jobs", "2",
        "--out", str(tmp_path / "runs"), "b=2", "--arms", "none",
    ]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "--arms none: there are vit, " in found.stderr


def test_a_run_that_was_told_to_stop_is_not_done(tmp_path, monkeypatch):
    from tools import compare_windows

    arguments = argparse.Namespace(out=tmp_path, data="data", settings=[], test=False, config="c")
    cores = queue.Queue()
    cores.put(set())
    monkeypatch.setattr(compare_windows, "_call", lambda *command: "")
    assert "stopped before its end" in compare_windows._run(arguments, "vit", 0, cores)
    (tmp_path / "vit_0").mkdir()
    (tmp_path / "vit_0" / "val.json").write_text("{}")
    assert not compare_windows._run(arguments, "vit", 0, cores)


def test_a_table_of_other_settings_is_not_replaced(tmp_path, monkeypatch, capsys):
    from tools import compare_windows

    table = {"config": "configs/winft_study.py", "settings": ["epochs=3"], "arms": {}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    arguments = ["compare_windows", "--data", "data", "--out", str(tmp_path), "epochs=3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        compare_windows.main()
    assert "--config configs/winft_study.py epochs=3: give the same" in capsys.readouterr().err
    assert json.loads((tmp_path / "table.json").read_text()) == table


def test_interrupted_it_begins_no_further_run(tmp_path, monkeypatch):
    from tools import compare_windows

    begun = []

    def interrupt(futures):
        next(iter(futures)).result()
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_windows, "_run", lambda *run: begun.append(run) or time.sleep(0.3))
    monkeypatch.setattr(compare_windows.concurrent.futures, "as_completed", interrupt)
    monkeypatch.setattr(sys, "argv", ["compare_windows", "--data", "d", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        compare_windows.main()
    assert stopped.value.code == 130 and len(begun) <= 2


@pytest.mark.slow
def test_runs_are_made_once_and_pooled(tmp_path):
    data, out = tiny.save(tmp_path / "data.npz"), tmp_path / "runs"

    def compare(*more):
        command = [
            sys.executable, "tools/compare_windows.py", "--config", "tests/train/arms.py",
            "--data", str(data), "--out", str(out), "--arms", "taught,vit,local",
            "--seeds", "0,1", *more,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment["VIT_INTERACT_COMPILE_CACHE"] = str(tmp_path / "programs")
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return found, json.loads((out / "table.json").read_text())

    done, table = compare("--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not table["failed"] and set(table["arms"]) == {"taught", "vit", "local"}
    assert all((out / name).stat().st_size > 5000 for name in ("curves.png", "areas.png"))
    runs = table["arms"]["taught"]["runs"]
    assert set(runs) == {"0", "1"} and runs["0"]["windows/iou"] > 0
    values = [run["val"] for run in runs.values()]
    assert table["arms"]["taught"]["val"]["mean"] == pytest.approx(sum(values) / 2)
    assert runs["0"]["test"] is None
    gain = table["arms"]["taught"]["gain"]
    plain = [run["val"] for run in table["arms"]["vit"]["runs"].values()]
    first, second = (own - other for own, other in zip(values, plain, strict=True))
    # Student's t of one degree of freedom; the standard error of two values is half their distance.
    half = 12.7062 * abs(first - second) / 2
    assert gain["val"]["mean"] == pytest.approx((first + second) / 2)
    assert gain["val"]["interval"][1] == pytest.approx(gain["val"]["mean"] + half, abs=1e-5)
    assert gain["test"] is None and "gain" not in table["arms"]["vit"]
    # The second time nothing is trained, and only now is the test split read.
    again, table = compare("--test")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [run["val"] for run in table["arms"]["taught"]["runs"].values()] == values
    assert table["arms"]["vit"]["test"]["deviation"] is not None
    # On another machine the table stands for its runs, if nothing else is asked of them.
    (out / "table.json").rename(known := tmp_path / "known.json")
    for folder in ("vit_0", "local_1"):
        shutil.rmtree(out / folder)
    other, table = compare("--known", str(known))
    assert other.returncode == 0, other.stdout + other.stderr
    assert [run["val"] for run in table["arms"]["taught"]["runs"].values()] == values
    assert not (out / "vit_0").exists() and not (out / "local_1").exists()
    _, table = compare("--known", str(known), "--arms", "vit", "--seeds", "0")
    assert set(table["arms"]) == {"taught", "vit", "local"}
    assert all(set(row["runs"]) == {"0", "1"} for row in table["arms"].values())
    refused, _ = compare("--known", str(known), "epochs=3")
    assert refused.returncode == 2 and "give the same settings" in refused.stderr
    refused, _ = compare("epochs=3")
    assert refused.returncode == 2 and "or another folder" in refused.stderr
    # A run that cannot be is told, and the others are made.
    out = tmp_path / "others"
    broken, table = compare("--arms", "vit,local", "--seeds", "0", "winft.size=(0,0)")
    assert broken.returncode == 1 and "at least 1x1" in table["failed"]["local_0"]
    assert set(table["arms"]) == {"vit"}
