import collections
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import vit_interact as vi
from tests.cli_data import CLASSES, photographs, tiny_weights
from tests.models.helpers import tiny
from vit_interact.cli import app
from vit_interact.cli.shell import progress

RUNNER = CliRunner()


def run(*arguments, code=0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    return result


def one_error(*arguments, code=1):
    lines = run(*arguments, code=code).stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    return errors[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def test_nothing_heavy_is_imported_eagerly():
    code = (
        "import sys, vit_interact, vit_interact.cli; "
        "from typer.testing import CliRunner; "
        "r = CliRunner().invoke(vit_interact.cli.app, ['--help']); assert r.exit_code == 0; "
        "print([m for m in ('jax', 'matplotlib', 'flax', 'xarray', 'zarr') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [(), ("analyze",), ("demo",), ("models",), ("convert",)])
def test_help_has_examples(command):
    text = run(*command, "--help").output
    assert not command or "Example" in text


def test_help_breaks_lines_where_the_terminal_ends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in run("analyze", "--help").output.splitlines()]
    first = next(k for k, line in enumerate(lines) if line.startswith("The output folder"))
    assert min(map(len, lines[first : first + 3])) > 65  # and none of one word


def test_shares_of_an_image_add_up_to_it(capsys):
    with progress("writing", 1, first="") as advance:
        for _ in range(10):
            advance(0.1)
    assert "1/1" in capsys.readouterr().err


def test_version_and_models():
    assert run("--version").output.split() == ["vit-interact", vi.__version__]
    rows = json.loads(run("models", "--json").output)
    assert [row["name"] for row in rows] == vi.list_models()
    assert {row["name"]: row["parameters"] for row in rows}["vit_b16"] == 86_567_656
    assert "dinov2_s14_reg" in run("models").output


def test_analyze_leaves_a_folder(tmp_path, weights):
    images = photographs(tmp_path / "in", 3)
    out = tmp_path / "out"
    result = run("analyze", images, "--model", weights, "--out", out, "--batch-size", 2)
    assert "preprocessing: stretch to 12x16" in result.output
    dataset = xr.open_zarr(out / "analysis.zarr").load()
    assert list(dataset["image"].values) == ["0.png", "1.png", "2.png"]
    assert dict(dataset.sizes) | {"image": 3, "layer": 3, "query": 12, "key": 12} == dict(
        dataset.sizes
    )
    assert list(dataset.coords["class_name"].values) == list(CLASSES)  # after a second batch, too
    assert dataset.attrs["model"].endswith("tiny.safetensors")
    assert len(dataset.attrs["weights_sha256"]) == 64
    assert not json.loads(dataset.attrs["architecture"])["scan"], "of the weights, not of the run"
    np.testing.assert_allclose(dataset["combined_interaction"].sum("key"), 1, atol=1e-5)
    folders = sorted(path.name for path in (out / "images").iterdir())
    assert len(folders) == 3
    assert len(list((out / "images" / folders[0]).glob("*.png"))) == 6
    page = (out / "index.html").read_text()
    assert "<b>elk</b>" not in page and folders[0] in page
    assert (out / "contact_sheet.png").exists()

    # The numbers are those of the library on the same pixels.
    checkpoint = vi.load_checkpoint(weights)
    picture = dataset["picture"].values
    again = vi.analyze(
        checkpoint.model, checkpoint.params, checkpoint.preprocess.normalize(picture)
    )
    np.testing.assert_allclose(dataset["interaction"], again["interaction"], atol=1e-5)
    np.testing.assert_array_equal(dataset["prediction"], again["prediction"])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_figures_of_other_processes_are_the_same(tmp_path, weights, monkeypatch, count):
    import matplotlib.figure  # noqa: F401, or the first ones are drawn there, too

    def figures(name):
        run("analyze", images, "--model", weights, "--out", tmp_path / name)
        root = tmp_path / name / "images"
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.png")}

    images = photographs(tmp_path / "in", count)
    here = figures("here")
    monkeypatch.setattr("vit_interact.drawing._POOL_FROM", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert len(here) == 6 * count and figures("there") == here


def test_an_analysis_in_bfloat16_is_another(tmp_path, weights):
    images = photographs(tmp_path / "in", 1)
    command = ("analyze", images, "--model", weights, "--out", tmp_path / "out")
    run(*command, "--figures", "none", "--dtype", "bfloat16")
    with xr.open_zarr(tmp_path / "out" / "analysis.zarr") as data:
        assert data["probability"].dtype == "float32"
        assert json.loads(data.attrs["architecture"])["dtype"] == "bfloat16"
    assert "holds an analysis with" in one_error(*command)


@pytest.mark.slow
def test_same_command_skips_and_new_images_are_added(tmp_path, weights):
    images = photographs(tmp_path / "in", 2)
    out = tmp_path / "out"
    command = ("analyze", images, "--model", weights, "--out", out, "--indicator", "attention")
    run(*command)
    figure = next((out / "images").glob("*/windows.png"))
    stamp = figure.stat().st_mtime_ns
    assert "0 analysed, 2 done before" in run(*command).output
    photographs(tmp_path / "in" / "more", 2, seed=1)
    assert "2 analysed, 2 done before" in run(*command).output
    assert figure.stat().st_mtime_ns == stamp
    dataset = xr.open_zarr(out / "analysis.zarr")
    assert list(dataset["image"].values) == ["0.png", "1.png", "more/0.png", "more/1.png"]


@pytest.mark.slow
def test_other_options_do_not_mix(tmp_path, weights):
    images = photographs(tmp_path / "in", 1)
    command = ("analyze", images, "--model", weights, "--out", tmp_path / "out")
    run(*command)
    message = one_error(*command, "--coverage", "0.5")
    assert "coverage=0.9 (not 0.5)" in message and "--overwrite" in message
    run(*command, "--coverage", "0.5", "--overwrite")
    assert xr.open_zarr(tmp_path / "out" / "analysis.zarr").attrs["coverage"] == 0.5


def test_bad_images_are_listed_and_the_rest_goes_on(tmp_path, weights):
    images = photographs(tmp_path / "in", 2)
    (images / "a_text.jpg").write_text("hello")
    (images / "b_empty.png").touch()
    out = tmp_path / "out"
    result = run("analyze", images, "--model", weights, "--out", out, code=3)
    assert "2 analysed, 2 failed" in result.output
    assert "is empty" in result.stderr
    assert "a_text.jpg" in (out / "index.html").read_text()
    only_bad = run(
        "analyze", images / "a_text.jpg", "--model", weights, "--out", tmp_path / "o2", code=1
    )
    assert "0 analysed, 1 failed" in only_bad.output


@pytest.mark.slow
def test_same_names_in_two_folders(tmp_path, weights):
    first, second = (photographs(tmp_path / name, 1, seed) for seed, name in enumerate("ab"))
    run("analyze", first, second, "--model", weights, "--out", tmp_path / "out")
    dataset = xr.open_zarr(tmp_path / "out" / "analysis.zarr")
    assert list(dataset["image"].values) == ["a/0.png", "b/0.png"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--indicator", "saliency"], "unknown indicator 'saliency'; known: attention"),
        (["--coverage", "0"], "expected a share in (0, 1]"),
        (["--layers", "0,x"], "expected numbers such as 0,5,11"),
        (["--layers", "7"], "the model has layers 0 to 2"),
        (["--score", "bees"], "did you mean bee?"),
        (["--score", "5"], "a class number below 5"),
        (["--batch-size", "0"], "expected at least 1"),
        (["--model", "none.safetensors"], "none.safetensors"),
        (["--dtype", "half"], "--dtype 'half': expected float32 or bfloat16"),
        (["--image-size", "13"], "not a multiple of the patch"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, weights, options, message):
    images = photographs(tmp_path / "in", 1)
    command = ["analyze", images, "--model", weights, "--out", tmp_path / "out", *options]
    assert message in one_error(*command)


def test_wrong_inputs_are_one_line(tmp_path, weights):
    assert "no such file" in one_error("analyze", tmp_path / "none.jpg", "--model", weights)
    (tmp_path / "file").touch()
    images = photographs(tmp_path / "in", 1)
    out = tmp_path / "file"
    assert "is a file" in one_error("analyze", images, "--model", weights, "--out", out)
    (tmp_path / "theirs" / "analysis.zarr").mkdir(parents=True)
    message = one_error("analyze", images, "--model", weights, "--out", tmp_path / "theirs")
    assert "not made by this command" in message


@pytest.mark.slow
def test_score_and_layers_reach_the_measure(tmp_path, weights):
    images = photographs(tmp_path / "in", 1)
    for name, score in (("a", "cat"), ("b", "2"), ("c", "bee")):
        run("analyze", images, "--model", weights, "--out", tmp_path / name,
            "--indicator", "edge", "--score", score, "--layers", "1,-3")  # fmt: skip
    a, b, c = (xr.open_zarr(tmp_path / name / "analysis.zarr").load() for name in "abc")
    assert list(a["layer"].values) == [0, 1]
    np.testing.assert_array_equal(a["interaction"], b["interaction"])
    assert np.abs(a["interaction"] - c["interaction"]).max() > 0


@pytest.mark.slow
def test_weights_without_classes(tmp_path):
    model, params, _ = tiny(num_classes=0)
    path = tmp_path / "features.safetensors"
    vi.export_timm(model, params, path)
    images = photographs(tmp_path / "in", 1)
    command = ("analyze", images, "--model", path, "--out", tmp_path / "out")
    assert "these weights have no classes" in one_error(*command, "--indicator", "edge")
    assert "prediction" not in run(*command).output
    assert "prediction" not in xr.open_zarr(tmp_path / "out" / "analysis.zarr")
    assert "no classes" in (tmp_path / "out" / "index.html").read_text()
    run(*command, "--indicator", "edge", "--score", "3", "--overwrite")


def test_convert_round_trip(tmp_path, weights):
    target = tmp_path / "half.safetensors"
    run("convert", weights, target, "--dtype", "float16")
    assert "exists; --force" in one_error("convert", weights, target)
    assert "must end in .safetensors" in one_error("convert", weights, tmp_path / "x.npz")
    again = vi.load_checkpoint(target)
    assert again.class_names == CLASSES and again.preprocess.crop == "stretch"


@pytest.mark.slow
def test_one_compilation_for_all_batches(tmp_path, weights, caplog):
    """Five images of five sizes in batches of two: the last one is padded."""
    import logging

    import jax

    images = photographs(tmp_path / "in", 5)
    jax.clear_caches()  # Tests before this one, in the same process, may have compiled some of it.
    # Not `jax.log_compiles()`, which is of this thread: another one compiles, too.
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level(logging.WARNING):
        run("analyze", images, "--model", weights, "--out", tmp_path / "out",
            "--batch-size", 2, "--coverage", "0.77")  # fmt: skip
    jax.config.update("jax_log_compiles", False)
    found = (re.match(r"Finished XLA compilation of jit\((_.*?)\)", r) for r in caplog.messages)
    compiled = collections.Counter(match.group(1) for match in found if match)
    analysis = {"_analyze": 1, "_windows_of": 1}
    # The report compares windows of other numbers of maps than a batch of two has.
    assert compiled == {**analysis, "_windows_of": 2}


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "made", ["images/0.png", "index.html", "contact_sheet.png", "progress.json"]
)
def test_files_of_others_in_the_output_folder_stay(tmp_path, weights, made, options):
    """`--out .` beside a folder `images` of photographs."""
    theirs = tmp_path / made
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_bytes(b"{}")
    images = photographs(tmp_path / "in", 1)
    message = one_error("analyze", images, "--model", weights, "--out", tmp_path, *options)
    assert "was not made by this command" in message
    assert theirs.read_bytes() == b"{}"


def test_names_and_files_that_are_none(tmp_path, weights):
    """A pipe does not hang the command, and a name that is not UTF-8 does not end it."""
    images = photographs(tmp_path / "in", 1)
    os.rename(images / "0.png", os.fsencode(images) + b"/\xff.png")
    os.mkfifo(tmp_path / "pipe.png")
    (images / "empty.png").touch()
    os.rename(images / "empty.png", os.fsencode(images) + b"/\xfe.png")
    out = tmp_path / "out"
    result = run("analyze", images, tmp_path / "pipe.png", "--model", weights, "--out", out, code=3)
    assert "1 analysed, 2 failed" in result.output
    assert "no regular file" in result.stderr
    assert list(xr.open_zarr(out / "analysis.zarr")["image"].values) == ["in/\\udcff.png"]


def test_batches_are_no_larger_than_the_work(tmp_path, weights):
    images = photographs(tmp_path / "in", 1)
    run("analyze", images, "--model", weights, "--out", tmp_path / "out",
        "--batch-size", 10**9)  # fmt: skip
