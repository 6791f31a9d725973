"""Whole runs: they learn, go on exactly, and give the same whatever they are spread over."""

import json
import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

import vit_interact as vi
from tests.train import tiny
from vit_interact.data.images import ImageError
from vit_interact.processes import claimed
from vit_interact.train.inputs import Feed
from vit_interact.train.log import read_lines
from vit_interact.train.meter import DivergedError
from vit_interact.train.sharding import make_mesh
from vit_interact.train.train import train

TWO = jax.devices()[:2]


def losses(workdir):
    lines = read_lines(workdir / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps with everything on."""
    workdir = tmp_path_factory.mktemp("run")
    settings = tiny.config(
        steps=12, eval__every=4, checkpoint__every=3, checkpoint__keep_last=10,
        data__test="test", ema=0.9,
        interactions__every=4, interactions__images=8, interactions__coverages=(),
        model__fields={**tiny.FIELDS, "dropout": 0.1, "stochastic_depth": 0.1},
        augment__mixup=0.2, augment__erase=0.2, tensorboard=True,
    )  # fmt: skip
    return workdir, settings, train(settings, workdir, tiny.data(), devices=TWO)


def test_a_run_learns_and_leaves_its_files(run):
    workdir, _, result = run
    assert result["finished"] and result["step"] == 12
    assert result["test"]["accuracy"] > 0.5 and result["val"]["examples"] == 20
    lines = read_lines(workdir / "metrics.jsonl")
    evaluated = {line["step"]: line["val/accuracy"] for line in lines if "val/accuracy" in line}
    tested = json.loads((workdir / "test.json").read_text())["step"]
    assert evaluated[tested] == max(evaluated.values())
    found = losses(workdir)
    assert sorted(found) == list(range(1, 13)) and found[12] < found[1]
    for name in ("test.json", "val_confusion.png", "curves.png", "experiment.json"):
        assert (workdir / name).is_file(), name
    assert json.loads((workdir / "test.json").read_text())["per_class"].keys() == set(tiny.NAMES)
    assert list((workdir / "tensorboard").iterdir())


def test_the_indicator_is_logged_alongside(run):
    workdir, _, _ = run
    lines = [
        line for line in read_lines(workdir / "metrics.jsonl") if "interactions/seconds" in line
    ]
    assert [line["step"] for line in lines] == [0, 4, 8]
    spread = [line["interactions/attention_spread/layer_01"] for line in lines]
    assert all(0 < value < 6 for value in spread) and len(set(spread)) == 3


def test_a_finished_run_opens_as_a_model(run):
    workdir, _, _ = run
    checkpoint = vi.load_checkpoint(workdir)
    assert checkpoint.class_names == tiny.NAMES
    images = tiny.data()["val"].images
    logits = checkpoint.model.apply(
        {"params": checkpoint.params}, checkpoint.preprocess.normalize(images)
    )
    right = np.mean(np.argmax(logits, -1) == tiny.data()["val"].labels)
    best = max(line.get("val/accuracy", 0) for line in read_lines(workdir / "metrics.jsonl"))
    assert right == pytest.approx(best)


@pytest.mark.slow
def test_a_run_goes_on_exactly_from_any_checkpoint(run, tmp_path):
    workdir, settings, _ = run
    for step in (6, 9):
        copy = tmp_path / str(step)
        shutil.copytree(workdir, copy)
        for newer in (copy / "checkpoints").iterdir():
            if int(newer.name) > step:
                shutil.rmtree(newer)
        result = train(settings, copy, tiny.data(), devices=TWO)
        assert result["done"] == 12 - step
        assert losses(copy) == losses(workdir)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run, tmp_path):
    workdir, settings, _ = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    for file in (copy / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (copy / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        result = train(settings, copy, tiny.data(), devices=TWO)
    assert result["done"] >= 1 and losses(copy) == losses(workdir)


def test_another_config_says_what_differs(run):
    workdir, settings, _ = run
    changed = settings.copy_and_resolve_references()
    changed.optimizer.b2 = 0.95
    changed.log_every = 2  # changes nothing that is computed
    with pytest.raises(ValueError, match=r"config\.optimizer\.b2: 0\.999, now 0\.95") as caught:
        train(changed, workdir, tiny.data(), devices=TWO)
    assert "log_every" not in str(caught.value)


def test_evaluation_only(run):
    workdir, settings, _ = run
    only = settings.copy_and_resolve_references()
    only.eval_only = True
    before = (workdir / "metrics.jsonl").read_text()
    found = train(only, workdir, tiny.data(), devices=TWO)
    assert found["val"]["examples"] == 20 and found["test"]["examples"] == 12
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_starts_from_another_with_a_new_head_and_resolution(run, tmp_path):
    workdir, _, _ = run
    fewer = tiny.pictures()
    fewer = type(fewer)(fewer.images, fewer.labels % 2, ("even", "odd"))
    settings = tiny.config(
        init=str(workdir), model__name="", model__image_size=(24, 24), data__val="", steps=2,
        model__fields=dict.fromkeys(tiny.FIELDS),
        optimizer__freeze=r"^(embedding|Transformer/encoderblock_0)",
    )  # fmt: skip
    before = vi.load_checkpoint(workdir).params
    train(settings, tmp_path, {"train": fewer}, devices=TWO)
    after = vi.load_checkpoint(tmp_path)
    assert after.model.config.num_classes == 2 and after.model.config.image_size == (24, 24)
    same = jax.tree.map(np.array_equal, before["Transformer"], after.params["Transformer"])
    assert all(jax.tree.leaves(same["encoderblock_0"]))
    assert not any(jax.tree.leaves(same["encoderblock_1"]["MlpBlock_0"]))


def test_unreadable_photographs_are_named_once(capsys):
    class Damaged(tiny.Arrays):
        def read(self, index):
            if index in (3, 5):
                raise ImageError(self.name(index), "is damaged")
            return super().read(index)

    whole = tiny.pictures(8)
    source = Damaged(whole.images, whole.labels, whole.class_names)
    settings, mesh = tiny.config(batch_size=8), make_mesh()
    feed = Feed(source, settings, mesh, (16, 16))
    masks = [np.asarray(batch["mask"]).sum() for batch in feed.batches(range(3))]
    assert masks == [6, 6, 6]
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == ["warning: left out image 3", "warning: left out image 5"]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The loss curve of a single device."""
    workdir = tmp_path_factory.mktemp("one")
    train(tiny.config(), workdir, tiny.data(), devices=jax.devices()[:1])
    return losses(workdir)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"sharding__strategy": "replicate"}, marks=pytest.mark.slow),
        pytest.param({"sharding__strategy": "fsdp"}, marks=pytest.mark.slow),
        pytest.param(
            {"sharding__strategy": "tensor", "sharding__fsdp": 2, "sharding__model": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer__accumulate": 2, "augment__where": "host"}, marks=pytest.mark.slow
        ),
    ],
    ids=["replicate", "fsdp", "tensor", "accumulate"],
)
def test_eight_devices_give_the_curve_of_one(changes, one_device, tmp_path):
    train(tiny.config(**changes), tmp_path, tiny.data())
    found = losses(tmp_path)
    assert found.keys() == one_device.keys()
    for step, loss in one_device.items():
        assert found[step] == pytest.approx(loss, abs=1e-4), step


@pytest.mark.slow
def test_diverging_runs_stop_and_name_the_last_good_checkpoint(tmp_path):
    settings = tiny.config(schedule__rate=1e38, optimizer__clip=0.0, checkpoint__every=1)
    with pytest.raises(DivergedError, match=r"last good checkpoint is .*checkpoints/1"):
        train(settings, tmp_path, tiny.data())


@pytest.mark.slow
def test_sigterm_saves_and_ends_and_the_run_goes_on(tmp_path, one_device):
    def interrupt():
        while len(losses(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    result = train(tiny.config(), tmp_path, Slow(tiny.data()), devices=jax.devices()[:1])
    assert 2 <= result["step"] < 6 and not result["finished"]
    assert signal.getsignal(signal.SIGTERM) is before
    again = train(tiny.config(), tmp_path, tiny.data(), devices=jax.devices()[:1])
    assert again["finished"] and losses(tmp_path) == one_device


class Slow(dict):
    """Data that take a while to read, so that a signal comes in time."""

    def __init__(self, splits):
        class Slowly(tiny.Arrays):
            def read(self, index):
                time.sleep(0.05)
                return super().read(index)

        train = splits["train"]
        super().__init__(splits, train=Slowly(train.images, train.labels, train.class_names))


@pytest.mark.slow
def test_half_precision_learns_alike(tmp_path):
    curves = []
    for dtype in ("float32", "bfloat16"):
        settings = tiny.config(model__dtype=dtype, steps=6)
        train(settings, tmp_path / dtype, tiny.data(), devices=TWO)
        curves.append(list(losses(tmp_path / dtype).values()))
        _, params = vi.load_model(tmp_path / dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert curves[0] != curves[1]
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.03)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with (
        claimed(tmp_path),
        pytest.raises(ValueError, match=f"process {os.getpid()} is at work in it"),
    ):
        train(tiny.config(), tmp_path, tiny.data())
    assert not (tmp_path / "metrics.jsonl").exists()
    # Whoever had it is gone.
    with claimed(tmp_path):
        pass
