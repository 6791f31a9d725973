"""Surveys: against NumPy, over devices and processes, in parts and merged, and the command."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import vit_interact as vi
from tests.data.photographs import photographs
from tests.models.helpers import tiny
from vit_interact import interactions as vx
from vit_interact.cli import app
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.sources import open_examples
from vit_interact.models.weights import load_checkpoint
from vit_interact.survey import Design, kernel, load_survey, merge_surveys, observe, pool
from vit_interact.survey.session import Survey

PREPROCESS = Preprocess(size=(12, 16))
NAMES = ("attention", "edge", "rollout")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model, params, _ = tiny(num_classes=2)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    vi.export_timm(model, params, path, preprocess=PREPROCESS, class_names=("cat", "dog"))
    return path


@pytest.fixture(scope="module")
def checkpoint(weights):
    return load_checkpoint(str(weights))


@pytest.fixture
def examples(tmp_path):
    return open_examples(photographs(tmp_path / "data", each=5), ("cat", "dog"), 2)[0]


def survey(checkpoint, examples, out, indicators=("attention",), coverages=(), **options):
    design = Design.of(checkpoint.model, indicators=indicators, coverages=coverages)
    options = {"batch_size": 4, "devices": jax.devices()[:2], **options}
    return Survey(checkpoint, examples, design, out, "data", **options)


def assert_same(one, other, exactly=False):
    assert set(one) == set(other)
    for name in one:
        for field in ("count", "mean", "m2", "min", "max", "histogram"):
            a, b = getattr(one[name], field), getattr(other[name], field)
            if a is None:
                assert b is None
            elif exactly:
                np.testing.assert_array_equal(a, b, err_msg=f"{name} {field}")
            else:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{name} {field}")


def test_kernel_by_hand():
    layout = vi.TokenLayout(2, 3, 0)
    view = np.random.default_rng(0).random((4, 6, 6)).astype(np.float32)
    view[3] = 0
    found = np.asarray(kernel(jnp.asarray(view), layout))
    assert found.shape == (4, 3, 5)
    for row in range(-1, 2):
        for col in range(-2, 3):
            pairs = [
                (r * 3 + c, (r + row) * 3 + c + col)
                for r in range(2)
                for c in range(3)
                if 0 <= r + row < 2 and 0 <= c + col < 3
            ]
            expected = np.mean([view[:3, q, k] for q, k in pairs], axis=0)
            np.testing.assert_allclose(found[:3, row + 1, col + 2], expected, rtol=1e-5)
    assert np.isnan(found[3]).all()


@pytest.mark.slow
def test_statistics_are_those_of_the_arrays(tmp_path, checkpoint, examples):
    """All images at once in NumPy, from `vi.measure` and raw attention weights."""
    work = survey(checkpoint, examples, tmp_path / "s.zarr", NAMES, (0.5, 0.9))
    statistics = load_survey_of(work)
    model, params, layout = checkpoint.model, checkpoint.params, checkpoint.model.config.layout
    pictures = np.stack([PREPROCESS.picture(one.read()) for one in examples])
    images = PREPROCESS.normalize(jnp.asarray(pictures))
    position = layout.positions().astype(float)
    far = np.linalg.norm(position[:, None] - position[None], axis=-1)

    weights = np.asarray(vi.capture(model, params, images, need=("weights",)).weights, float)
    rows = weights[..., layout.prefix :, layout.prefix :]
    distance = ((rows / rows.sum(-1, keepdims=True)) * far).sum(-1).mean(-1)  # L B H
    check(statistics["attention_distance"], np.moveaxis(distance, 1, 0))

    for name, maps in vi.measure(model, params, images, NAMES).items():
        view = vx.patch_view(maps, layout)
        field = vx.responsive_field(view, layout)
        flat = lambda a: np.asarray(a, float).reshape(len(a), -1).T  # noqa: E731
        check(statistics[f"{name}_spread"], flat(field.spread))
        check(statistics[f"{name}_entropy"], flat(field.entropy))
        check(statistics[f"{name}_tendency_col"], flat(field.tendency[..., 1]))
        kernels = np.asarray(kernel(view, layout), float)
        check(statistics[f"{name}_kernel"], np.moveaxis(kernels, 1, 0))
        area = np.asarray(
            vx.window_area(vx.smallest_windows(view, layout, (0.5, 0.9)), layout), float
        )
        area = np.where(np.isnan(field.spread), np.nan, area)  # Q L B P
        check(
            statistics[f"{name}_window_area"],
            np.moveaxis(area, 1, 0).reshape(3, 2, -1).T.swapaxes(1, 1),
        )
    # With a class token, patches of the last layer cannot change the score.
    assert statistics["edge_spread"].count[-1] == 0 and statistics["edge_spread"].count[0] > 0


def check(found, entries):
    assert entries.shape[1:] == found.count.shape
    np.testing.assert_array_equal(found.count, (~np.isnan(entries)).sum(0))
    seen = np.asarray(found.count) > 0
    where = [np.where(seen, a, 0) for a in (found.mean, found.variance, found.max)]
    some = np.where(np.isnan(entries).all(0), 0, entries)
    for value, expected in zip(where, (np.nanmean, np.nanvar, np.nanmax), strict=True):
        np.testing.assert_allclose(value, expected(some, axis=0), atol=2e-4, rtol=2e-4)


def load_survey_of(one):
    one.run()
    return load_survey(one.out)[1]


@pytest.mark.slow
def test_devices_batches_and_padding_do_not_matter(tmp_path, checkpoint, examples):
    devices = jax.devices()
    assert len(devices) == 8
    alone = load_survey_of(survey(checkpoint, examples, tmp_path / "1.zarr", devices=devices[:1]))
    split = load_survey_of(
        survey(checkpoint, examples, tmp_path / "8.zarr", devices=devices, batch_size=8)
    )
    assert_same(alone, split)
    assert alone["attention_distance"].count.max() == len(examples)


@pytest.mark.slow
def test_a_killed_survey_goes_on_exactly(tmp_path, checkpoint, examples):
    whole = load_survey_of(survey(checkpoint, examples, tmp_path / "whole.zarr"))

    class Killed(Exception):
        pass

    def kill(images):
        if images and work.done == 8:
            raise Killed

    out = tmp_path / "killed.zarr"
    work = survey(checkpoint, examples, out, save_every=0.0)
    with pytest.raises(Killed):
        work.run(kill)
    with pytest.raises(ValueError, match="exists; use --resume"):
        survey(checkpoint, examples, out)
    assert load_survey(out)[2]["images"] == 8
    os.replace(out, out.with_name(out.name + ".old"))  # as if killed between two renames
    again = survey(checkpoint, examples, out, resume=True)
    assert again.done == 8
    assert_same(load_survey_of(again), whole, exactly=True)
    finished = survey(checkpoint, examples, out, resume=True)
    assert_same(load_survey_of(finished), whole, exactly=True)
    with pytest.raises(ValueError, match="not the first ones here"):
        survey(checkpoint, examples[::-1], out, resume=True)
    with pytest.raises(ValueError, match="with the same --data and --skip"):
        survey(checkpoint, examples, out, resume=True, skip=3)
    with pytest.raises(ValueError, match="other indicators, coverages"):
        survey(checkpoint, examples, out, ("edge",), (0.5,), resume=True)


@pytest.mark.slow
def test_a_store_from_before_values_goes_on_without_them(tmp_path, checkpoint, examples):
    out = tmp_path / "old.zarr"
    design = Design.of(checkpoint.model, coverages=(), values=False)
    options = {"batch_size": 4, "devices": jax.devices()[:2]}
    Survey(checkpoint, examples[:4], design, out, "data", **options).run()
    work = survey(checkpoint, examples, out, resume=True)
    assert work.done == 4 and not work.design.values
    found = load_survey_of(work)
    assert found["attention_spread"].count.sum() > 0 and "attention_value" not in found


def test_merged_surveys_are_one(tmp_path, checkpoint, examples):
    whole = load_survey_of(survey(checkpoint, examples, tmp_path / "whole.zarr"))
    survey(checkpoint, examples[:3], tmp_path / "a.zarr").run()
    survey(checkpoint, examples[3:], tmp_path / "b.zarr", skip=3).run()
    merge_surveys([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "ab.zarr")
    _, merged, about = load_survey(tmp_path / "ab.zarr")
    assert_same(merged, whole)
    assert about["ranges"] == [[0, 3], [3, 10]] and about["images"] == 10
    with pytest.raises(ValueError, match="both hold images 3 to 9"):
        merge_surveys([tmp_path / "ab.zarr", tmp_path / "b.zarr"], tmp_path / "no.zarr")
    with pytest.raises(ValueError, match="exists; use another"):
        merge_surveys([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "ab.zarr")
    with pytest.raises(ValueError, match="there is no such store"):
        load_survey(tmp_path / "no.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a store of vit-interact statistics"):
        load_survey(tmp_path / "empty")


def test_state_does_not_grow_and_one_program_serves_all(checkpoint, examples, tmp_path):
    """Memory is that of one batch, whatever the number of images: the state keeps its shapes."""
    work = survey(checkpoint, examples, tmp_path / "s.zarr")
    before = jax.tree.map(np.shape, work.statistics)
    work.run()
    assert jax.tree.map(np.shape, work.statistics) == before


def test_no_stack_over_heads_exists():
    model, params, images = tiny(num_classes=2, batch=4)
    design = Design.of(model, coverages=())

    def step(statistics, params, images):
        return pool(statistics, observe(design, model, params, images), jnp.ones(4, bool))

    text = jax.jit(step).lower(design.empty(), params, images).compile().as_text()
    config = model.config
    tokens = config.layout.num_tokens
    assert f"[{config.depth},4,{config.heads},{tokens},{tokens}]" not in text


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.slow
def test_commands(tmp_path, weights):
    data = photographs(tmp_path / "data", each=4)
    common = ("statistics", "--model", weights, "--data", data, "--batch-size", "8")
    out = tmp_path / "a.zarr"
    result = call(*common, "--limit", "3", "--out", out)
    assert result.exit_code == 0, result.output
    assert call(*common, "--skip", "3", "--out", tmp_path / "b.zarr").exit_code == 0
    result = call("merge-statistics", out, tmp_path / "b.zarr", "--out", tmp_path / "ab.zarr")
    assert result.exit_code == 0 and "8 images in" in result.output, result.output
    names = {path.name for path in (tmp_path / "ab_figures").iterdir()}
    assert names == {
        "kernel_attention.png", "fields.png", "attention_distance.png", "windows.png", "values.png",
    }  # fmt: skip
    result = call(*common, "--out", out, "--resume")
    assert result.exit_code == 0 and "8 images in" in result.output, result.output
    _, statistics, _ = load_survey(out)
    assert_same(statistics, load_survey(tmp_path / "ab.zarr")[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--indicators", "magic"), "magic"),
        (("--coverages", "0"), "expected shares in (0, 1]"),
        (("--limit", "7"), "cannot skip 0 and take 7"),
        (("--batch-size", "3"), "does not divide over 8 devices"),
        (("--processes", "2"), "need --coordinator"),
        (("--coordinator", "localhost:1", "--processes", "2"), "needs --processes N and"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, weights, options, message):
    data = photographs(tmp_path / "data", each=3)
    out = tmp_path / "s.zarr"
    result = call(
        "statistics", "--model", weights, "--data", data, "--out", out, "--batch-size", "8",
        *options,
    )  # fmt: skip
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, weights):
    data = photographs(tmp_path / "data", each=5)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vit_interact.cli", "statistics", "--model", str(weights),
        "--data", str(data), "--batch-size", "4",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    together = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "two.zarr"), "--coordinator", f"localhost:{port}",
             "--processes", "2", "--process", str(number)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0].decode() for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    result = call(*command[3:], "--batch-size", "8", "--out", tmp_path / "one.zarr")
    assert result.exit_code == 0, result.output
    _, two, about = load_survey(tmp_path / "two.zarr")
    assert_same(two, load_survey(tmp_path / "one.zarr")[1])
    assert about["device"].startswith("2 x") and about["images"] == 10
    assert json.dumps(about)


@pytest.mark.slow
def test_a_backbone_and_a_flat_folder(tmp_path):
    model, params, _ = tiny(num_classes=0)
    weights = tmp_path / "backbone.safetensors"
    vi.export_timm(model, params, weights, preprocess=PREPROCESS)
    data = photographs(tmp_path / "data", classes=("a",), each=3) / "a"
    common = ("statistics", "--model", weights, "--data", data, "--batch-size", "8")
    out = tmp_path / "s.zarr"
    result = call(*common, "--coverages", "none", "--out", out)
    assert result.exit_code == 0 and "3 images in" in result.output, result.output
    assert not any("window" in name for name in load_survey(out)[1])
    result = call(*common, "--indicators", "edge", "--out", tmp_path / "edge.zarr")
    assert result.exit_code == 1 and "these weights have none" in result.stderr
