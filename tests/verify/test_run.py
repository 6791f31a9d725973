"""The whole verification of a tiny model: parts, kills, devices, programs and the command."""

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import vit_interact as vi
from tests.data.photographs import photographs
from tests.data.prepared import pets
from tests.models.helpers import tiny
from vit_interact import interactions as vx
from vit_interact.cli import app
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.sources import open_examples
from vit_interact.verify.parts import Parts
from vit_interact.verify.results import collect, rank_removal, rank_windows, to_csv
from vit_interact.verify.run import Plan, Programs, run_parts
from vit_interact.verify.subject import Subject

PLAN = Plan(
    ("attention", "rollout"),
    coverages=(0.4, 1.0),
    orders=("lowest", "highest"),
    shares=(0.5, 0.9),
    batch_size=4,
)
PREPROCESS = Preprocess(size=(12, 16))


@pytest.fixture(scope="module")
def programs():
    model, params, _ = tiny(num_classes=2)
    return Programs(Subject.of(model), params, PREPROCESS, PLAN, jax.devices()[:2])


@pytest.fixture
def examples(tmp_path):
    return open_examples(photographs(tmp_path / "data", each=3), ("cat", "dog"), 2)[0]


def arrays(parts):
    return {
        (test, name, key): value
        for test, name in PLAN.parts()
        if test != "average"
        for key, value in parts.load(test, name).items()
        if key != "seconds"
    } | {("average", "model", "mean"): parts.average.mean()}


@pytest.mark.slow
def test_killed_and_sharded_runs_give_the_same(tmp_path, programs, examples):
    whole = Parts(tmp_path / "whole", {}, ["a", "b"])
    run_parts(programs, whole, examples, PREPROCESS)
    before = programs.compilations()

    class Killed(Exception):
        pass

    done = []

    def kill(passes):
        done.append(passes)
        if len(done) == 8:
            raise Killed

    killed = Parts(tmp_path / "killed", {}, ["a", "b"])
    with pytest.raises(Killed):
        run_parts(programs, killed, examples, PREPROCESS, advance=kill)
    assert len(list(killed.folder.glob("*.npz"))) == 8 and killed.average.batches == 1
    killed = Parts(tmp_path / "killed", {}, ["a", "b"])
    run_parts(programs, killed, examples, PREPROCESS)
    # One program a static shape: measuring twice for windows and three times for orders, one
    # restricted, one masked, one grey, one for the whole model, one for the average over the data,
    # and one drop for each share.
    assert programs.compilations() == before == 2 + 3 + 5 + len(PLAN.shares)

    model, params, _ = tiny(num_classes=2)
    single = Programs(Subject.of(model), params, PREPROCESS, PLAN, jax.devices()[:1])
    alone = Parts(tmp_path / "alone", {}, ["a", "b"])
    run_parts(single, alone, examples, PREPROCESS)
    expected = arrays(whole)
    for other in (killed, alone):
        for key, value in arrays(other).items():
            np.testing.assert_allclose(value, expected[key], atol=1e-6, err_msg=str(key))


def test_results(tmp_path, programs, examples):
    parts = Parts(tmp_path / "out", {}, ["a", "b"])
    run_parts(programs, parts, examples, PREPROCESS)
    found = collect(parts, PLAN, programs.subject)
    assert found["base"]["images"] == 6
    rows = {(r["indicator"], r["variant"], r["kind"], r["coverage"]): r for r in found["windows"]}
    assert len(rows) == 2 * 12 * 2
    assert rows["rollout", "data", "indicator", 1.0]["top1"] == found["base"]["top1"]
    whole = rows["attention", "layers", "indicator", 1.0]
    assert whole["agreement"] == 1 and whole["area"] == 1 and whole["attention_flops"] == 1
    assert whole["top1"] == found["base"]["top1"]
    for variant in ("layers", "staged"):
        for kind in ("centred", "random", "lowest"):
            same = rows["attention", variant, kind, 0.4]["area"]
            np.testing.assert_allclose(same, rows["attention", variant, "indicator", 0.4]["area"])
    orders = {row["order"] for row in found["removal_auc"]}
    assert {"attention/lowest", "rollout/highest", "random2", "class_attention"} <= orders
    assert {r["removed"] for r in found["removal"]} == {0.0, 0.5, 0.9}
    assert rank_removal(found)[0]["auc"] >= rank_removal(found)[1]["auc"]
    assert {row["indicator"] for row in rank_windows(found)} == {"attention", "rollout"}
    lines = to_csv(found).splitlines()
    assert len({line.count(",") for line in lines}) == 1


def test_windows_of_the_data_are_those_of_the_mean_view(tmp_path, programs, examples):
    parts = Parts(tmp_path / "out", {}, ["a", "b"])
    run_parts(programs, parts, examples, PREPROCESS)
    model, params, _ = tiny(num_classes=2)
    pictures = np.stack([PREPROCESS.picture(one.read()) for one in examples])
    images = PREPROCESS.normalize(jax.numpy.asarray(pictures))
    maps = vi.measure(model, params, images, ("attention",))["attention"]
    mean = vx.patch_view(maps, model.config.layout).mean(axis=1)
    np.testing.assert_allclose(parts.average.mean()[0], mean, atol=1e-6)
    boxes = vx.smallest_windows(mean, model.config.layout, 0.4)
    np.testing.assert_array_equal(programs.data_windows["attention"][0], boxes)
    area = vx.window_area(boxes[:-1], model.config.layout).mean()
    found = parts.load("data", "attention")
    np.testing.assert_allclose(found["data/indicator/area"][0], area, rtol=1e-5)
    longer = Parts(tmp_path / "out", {}, ["a", "b", "c"])  # one more batch: other windows
    assert longer.average.batches == 2 and not longer.has("data", "attention", 0)
    (longer.folder / "average.npz").write_bytes(b"damaged")
    assert Parts(tmp_path / "out", {}, ["a", "b"]).average.batches == 0


def test_parts_belong_to_their_options(tmp_path):
    Parts(tmp_path / "out", {"seed": 0}, ["a"]).save("base", "model", 0, {"x": np.ones(2)})
    with pytest.raises(ValueError, match="holds a verification with other seed"):
        Parts(tmp_path / "out", {"seed": 1}, ["a"])
    more = Parts(tmp_path / "out", {"seed": 0}, ["a", "b"])  # more images: the first stay done
    assert more.has("base", "model", 0) and not more.has("base", "model", 1)
    assert not Parts(tmp_path / "out", {"seed": 0}, ["c"]).has("base", "model", 0)


def test_batches_divide_over_devices():
    model, params, _ = tiny(num_classes=2)
    with pytest.raises(ValueError, match="batch size 4 does not divide over 3 devices"):
        Programs(Subject.of(model), params, PREPROCESS, PLAN, jax.devices()[:3])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model, params, _ = tiny(num_classes=2)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    vi.export_timm(model, params, path, preprocess=PREPROCESS, class_names=("cat", "dog"))
    return path


@pytest.mark.slow
def test_faithfulness_in_parts(tmp_path, examples):
    """Edges and their images are the same however images are batched, and padding is left out."""
    model, params, _ = tiny(num_classes=2)
    found = {}
    for size, tags in ((4, ["a", "b"]), (2, ["a", "b", "c"])):
        plan = Plan(("attention", "edge"), tests=("faithfulness",), batch_size=size)
        programs = Programs(Subject.of(model), params, PREPROCESS, plan, jax.devices()[:2], model)
        parts = Parts(tmp_path / str(size), {}, tags)
        run_parts(programs, parts, examples, PREPROCESS, first_key=10)
        found[size] = collect(parts, plan, programs.subject, model.config)
        edges = parts.load("edges", "model")["edges"]
        assert sorted(set(edges[0])) == [10, 11, 12, 13, 14, 15]
        assert edges.shape == (4, 6 * 3 * 4)  # images, layers, edges of a layer
    for kind in ("faithfulness", "sanity", "groups"):
        for one, other in zip(found[4][kind], found[2][kind], strict=True):
            for key, value in one.items():
                close = value if isinstance(value, str) else pytest.approx(value, abs=1e-3)
                assert other[key] == close, (kind, key)
    rho = {row["indicator"]: row["rho"] for row in found[4]["faithfulness"]}
    assert rho["edge"] > rho["attention"]
    start = [row for row in found[4]["sanity"] if row["redrawn"] == 0]
    assert all(row["rho_original"] == pytest.approx(1) for row in start)
    assert len(found[4]["groups"]) == 2 * 3 * 4
    assert "mask_top" in to_csv(found[4])


def test_faithfulness_needs_our_model():
    model, params, _ = tiny(num_classes=2)
    plan = Plan(("attention",), tests=("faithfulness",), batch_size=2)
    with pytest.raises(ValueError, match="needs vit_interact's ViT"):
        Programs(Subject.of(model), params, PREPROCESS, plan, jax.devices()[:2])


def call(*arguments):
    return CliRunner().invoke(app, ["verify", *(str(a) for a in arguments)])


@pytest.mark.slow
def test_command(tmp_path, weights):
    data = photographs(tmp_path / "data", each=3)
    out = tmp_path / "out"
    options = ("--indicators", "attention", "--coverages", "0.4,1.0", "--interventions", "drop")
    result = call("--model", weights, "--data", data, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "to go" in result.output and "top-1 of the whole model" in result.output
    report = json.loads((out / "verify.json").read_text())
    assert report["options"]["images"] == 6 and report["drop_speed"]["speed_up"] > 0
    orders = {row["order"] for row in report["removal_auc"]}
    assert {"attention/staged", "attention/patches", "class_attention_staged"} <= orders
    assert (out / "windows.png").stat().st_size > 10_000
    assert (out / "removal.png").exists() and (out / "verify.csv").exists()


@pytest.mark.slow
def test_faithfulness_command(tmp_path, weights):
    data = photographs(tmp_path / "data", each=2)
    options = ("--indicators", "attention,edge", "--tests", "faithfulness", "--batch-size", "8")
    result = call("--model", weights, "--data", data, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "strongest" in result.output
    assert (tmp_path / "out" / "faithfulness.png").stat().st_size > 10_000


QUICK = ("--indicators", "attention", "--tests", "removal", "--interventions", "mask")


@pytest.mark.slow
def test_unreadable_images_are_named_and_left_out(tmp_path, weights):
    data = photographs(tmp_path / "data", each=3)
    broken = data / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    out = tmp_path / "out"
    result = call("--model", weights, "--data", data, "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"warning: left out {broken}: is damaged or cut short")
    report = json.loads((out / "verify.json").read_text())
    assert report["options"]["images"] == report["base"]["images"] == 5
    (left_out,) = report["left_out"]
    assert left_out["image"] == str(broken) and "cut short" in left_out["reason"]


@pytest.mark.slow
def test_command_with_tfds(tmp_path, weights, monkeypatch):
    pets(tmp_path, broken=[3])
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    out = tmp_path / "out"
    result = call("--model", weights, "--data", "tfds:pets", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "verify.json").read_text())
    assert report["base"]["images"] == 5 and len(report["left_out"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--indicators", "magic"), "magic"),
        (("--coverages", "1.2"), "expected shares in (0, 1]"),
        (("--tests", "windows,luck"), "--tests 'luck'"),
        (("--limit", "7"), "has 6 images; cannot skip 0 and take 7"),
        (("--data", "nowhere"), "nowhere: expected 'embedded', tfds:NAME or a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, weights, options, message):
    data = photographs(tmp_path / "data", each=3)
    out = tmp_path / "out"
    result = call("--model", weights, "--data", data, "--out", out, *options)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()
