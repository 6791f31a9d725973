"""Training with windows: what is learned, from whom, and what it is compared with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vit_interact as vi
from tests.models.helpers import applied
from tests.train import tiny
from vit_interact.data.augment import Augment
from vit_interact.data.preprocess import Preprocess
from vit_interact.interactions.boxes import clipped_boxes, iou, window_guidance
from vit_interact.interactions.views import patch_view
from vit_interact.interactions.window_masks import window_area
from vit_interact.interactions.windows import smallest_windows
from vit_interact.models.config import WindowConfig
from vit_interact.models.winft import to_winft, without_windows
from vit_interact.survey.offsets import maps_of_kernel, offset_windows
from vit_interact.survey.quantities import Design, kernel, observe, pool
from vit_interact.survey.store import save, to_dataset
from vit_interact.train.alongside import Alongside
from vit_interact.train.config import as_json, differences
from vit_interact.train.optimizer import frozen_leaves
from vit_interact.train.sharding import make_mesh
from vit_interact.train.state import begin
from vit_interact.train.step import Recipe, make_train_step
from vit_interact.train.train import train
from vit_interact.train.windows import Guide, frozen_windows, guidance, plan_windows, window_shares

LAYERS = 2
ONE = jax.devices()[:1]


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def run(folder, **changes):
    settings = {"winft__windows": "predicted", "winft__every": 4, "steps": 4, **changes}
    train(tiny.config(**settings), folder, tiny.data(), devices=ONE)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def model():
    fields = {**tiny.FIELDS, "depth": LAYERS}
    return vi.create_model("vit_ti16", num_classes=4, image_size=16, **fields)


@pytest.fixture(scope="module")
def params(model):
    drawn = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    # Attention that is not uniform.
    return jax.tree.map(lambda leaf: leaf * (3.0 if leaf.ndim > 1 else 1.0), drawn)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 16, 16, 3))


def planned(model, params=None, **changes):
    return plan_windows(tiny.config(**changes), model, params, steps=10)


def test_what_guides_is_the_model_without_its_windows(model, params, images):
    ours, converted = to_winft(model, params)
    guide = Guide((0, 1), "attention", 0.6)
    windows, counts = guide.windows(ours, converted, None, images, Preprocess(size=(16, 16)))
    layout = model.config.layout
    view = patch_view(vi.measure(model, params, images, ("attention",))["attention"], layout)
    np.testing.assert_array_equal(windows, smallest_windows(view, layout, 0.6))
    assert counts.all() and 0.05 < float(window_area(windows, layout).mean()) < 0.9


def test_a_teacher_sees_images_in_its_own_colours(model, params, images):
    ours, theirs = (
        Preprocess(size=(16, 16), mean=(mean,) * 3, std=(std,) * 3)
        for mean, std in ((0.5, 0.5), (0.2, 0.25))
    )
    guide = Guide((1,), "attention", 0.6, model=model, preprocess=theirs)
    windows, _ = guide.windows(
        model, None, params, ours.normalize(jnp.asarray(picture_bytes(images))), ours
    )
    layout = model.config.layout
    seen = theirs.normalize(jnp.asarray(picture_bytes(images)))
    view = patch_view(vi.measure(model, params, seen, ("attention",))["attention"], layout)
    near = smallest_windows(view, layout, 0.6)[1:] == windows
    assert float(jnp.mean(near)) > 0.99


def picture_bytes(images):
    return np.asarray(jnp.clip(128 + 40 * images, 0, 255)).astype(np.uint8)


def test_loss_and_figures_are_means_over_patches(model):
    layout = model.config.layout
    keys = jax.random.split(jax.random.key(0), 3)
    distances = jax.random.uniform(keys[0], (2, 3, 1, layout.num_patches, 4), maxval=3.0)
    start = jax.random.randint(keys[1], (2, 3, layout.num_patches, 2), 0, 2)
    windows = jnp.concatenate([start, start + 2], axis=-1)
    counts = jax.random.bernoulli(keys[2], 0.7, windows.shape[:-1])
    losses, shared = guidance(distances, windows, counts, layout)
    boxes = clipped_boxes(distances, layout)[:, :, 0]
    for image in range(3):
        each, own = [], []
        for layer in range(2):
            here = counts[layer, image]
            goal = windows[layer, image]
            each.append(float(window_guidance(distances[layer, image, 0], goal, layout, here)))
            own.append(
                np.mean(np.asarray(iou(boxes[layer, image], goal.astype(float)))[np.asarray(here)])
            )
        assert float(losses[image]) == pytest.approx(np.mean(each), rel=1e-5)
        assert float(shared[image]) == pytest.approx(np.mean(own), rel=1e-5)
    sides = boxes[..., 2:] - boxes[..., :2]
    area = sides.prod(axis=-1).mean(axis=-1) / layout.num_patches
    np.testing.assert_allclose(window_shares(distances, layout), area.T, rtol=1e-5)


@pytest.mark.slow
def test_guidance_alone_makes_boxes_the_teachers_windows(tmp_path):
    teacher = tmp_path / "teacher"
    settings = tiny.config(steps=30, checkpoint__export="last")
    train(settings, teacher, tiny.data(), devices=ONE)
    lines = run(
        tmp_path / "run", winft__guide="teacher", winft__teacher=str(teacher), steps=60,
        winft__weight=(10.0, 10.0), winft__indicator="attention", winft__coverage=0.5,
        winft__every=1, schedule__rate=1e-2, optimizer__window_rate=5.0,
    )  # fmt: skip
    first, last = lines[0], lines[-1]
    # The pictures are noise, so the teacher's windows cannot be foretold altogether.
    assert first["windows/area"] > 0.98 and 0.3 < last["windows/area"] < 0.8
    assert last["windows/guidance"] < first["windows/guidance"] - 0.1
    assert {f"windows/area/layer_0{i}" for i in range(LAYERS)} < set(last)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["", "self"])
def test_a_run_opens_as_it_ended(tmp_path, guide):
    lines = run(
        tmp_path, winft__guide=guide, winft__sharpness=(1.0, 0.25), checkpoint__export="last"
    )
    assert ("windows/iou" in lines[-1]) == bool(guide)
    model, _ = vi.load_model(tmp_path)
    assert model.config.windows.sharpness == pytest.approx(0.25)
    # A run that begins with it goes on with its windows.
    again = run(tmp_path / "more", init=str(tmp_path), winft__sharpness=(0.25, 0.1), model__name="")
    assert again[0]["windows/area"] == pytest.approx(lines[-1]["windows/area"], abs=0.05)


@pytest.mark.slow
def test_evaluation_by_itself_takes_the_sharpness_that_the_run_ended_with(tmp_path):
    settings = {
        "winft__windows": "predicted", "winft__sharpness": (4.0, 0.25), "winft__every": 4,
        "schedule__rate": 0.05, "optimizer__window_rate": 20.0, "checkpoint__export": "last",
        "steps": 6, "init": "",
    }  # fmt: skip
    train(tiny.config(**settings), tmp_path / "run", tiny.data(), devices=ONE)
    ended = json.loads((tmp_path / "run" / "val.json").read_text())
    settings |= {"eval_only": True, "init": str(tmp_path / "run"), "model__name": ""}

    def judged(name, **changes):
        config = tiny.config(**{**settings, **changes})
        return train(config, tmp_path / name, tiny.data(), devices=ONE)["val"]

    assert judged("again")["loss"] == pytest.approx(ended["loss"], rel=1e-5)
    model, params = vi.load_model(tmp_path / "run")
    windows = dataclasses.replace(model.config.windows, hard=True)
    hard = model.clone(config=dataclasses.replace(model.config, windows=windows))
    data = tiny.data()["val"]
    images = vi.load_checkpoint(tmp_path / "run").preprocess.normalize(data.images)
    logits = applied(hard, params, images)
    own = -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(data.labels)), data.labels])
    assert judged("hard", winft__hard=True)["loss"] == pytest.approx(float(own), rel=1e-5)
    assert float(own) != pytest.approx(ended["loss"], rel=1e-4)


@pytest.mark.slow
def test_alongside_measures_windows_as_sharp_as_they_are(model, params):
    wide, wide_params = to_winft(model, params, WindowConfig(reach=-1.0, sharpness=2.0))
    sharp = planned(model, winft__windows="predicted")._replace(model=wide)._with(sharpness=0.3)
    mesh = make_mesh("replicate", 1, 1, ONE)
    pictures = jnp.asarray(tiny.data()["val"].images[:4])
    batch = {"pictures": pictures, "mask": jnp.ones(4, bool)}

    def spread(model, sharpness):
        alongside = Alongside(model, Preprocess(size=(16, 16)), mesh, batch, ("attention",), (0.9,))
        alongside.begin(0, wide_params, sharpness)
        _, watched = alongside.take()
        return alongside.scalars(watched)["interactions/attention_spread/layer_01"]

    assert spread(wide, 0.3) == pytest.approx(spread(sharp, None), rel=1e-5)
    assert spread(wide, 0.3) != pytest.approx(spread(wide, None), rel=1e-3)


@pytest.mark.parametrize("kind", [slow("local"), slow("shifted"), slow("random")])
def test_given_windows_stay_as_they_are(tmp_path, kind):
    lines = run(
        tmp_path, winft__windows=kind, winft__size=(2, 3), checkpoint__export="last", ema=0.9
    )
    assert "windows/area" not in lines[-1]
    model, params = vi.load_model(tmp_path)
    found = [params["Transformer"][f"encoderblock_{i}"]["GivenWindows_0"] for i in range(LAYERS)]
    windows = np.stack([block["windows"] for block in found])
    area = (windows[..., 2:] - windows[..., :2]).prod(axis=-1)
    assert area.max() == 6 and (kind == "shifted" or area.min() == 6)
    assert (windows[0] == windows[1]).all() == (kind == "local")
    place = model.config.layout.positions()
    assert (windows[..., :2] <= place).all() and (place < windows[..., 2:]).all()


@pytest.mark.slow
def test_windows_of_a_survey(tmp_path, model, params, images):
    store = tmp_path / "survey.zarr"
    design = Design.of(model, indicators=("attention",))
    found = observe(design, model, params, images)
    statistics = pool(design.empty(), found, jnp.ones(len(images), bool))
    save(store, to_dataset(design, statistics, {"images": len(images)}))
    chosen = {"winft__file": str(store), "winft__indicator": "attention", "winft__coverage": 0.5}
    windows = offset_windows(store, model.config.layout, "attention", 0.5)
    run(tmp_path / "given", winft__windows="offset", checkpoint__export="last", **chosen)
    _, given = vi.load_model(tmp_path / "given")
    blocks = [given["Transformer"][f"encoderblock_{i}"] for i in range(LAYERS)]
    kept = np.stack([block["GivenWindows_0"]["windows"] for block in blocks])
    np.testing.assert_array_equal(kept, windows)
    taught = planned(model, winft__windows="predicted", winft__guide="file", **chosen)
    np.testing.assert_array_equal(taught.guide.fixed, windows)
    goal, _ = taught.guide.windows(model, params, None, images, Preprocess(size=(16, 16)))
    assert goal.shape == (LAYERS, len(images), 16, 4)
    with pytest.raises(ValueError, match="has attention, but no edge"):
        planned(model, winft__windows="offset", **{**chosen, "winft__indicator": "edge"})
    other = vi.create_model("vit_ti16", num_classes=4, image_size=(16, 20), **tiny.FIELDS)
    with pytest.raises(ValueError, match="a grid of 4x4; expected 4x5"):
        planned(other, winft__windows="offset", **chosen)


def test_maps_of_a_kernel_have_that_kernel(model):
    layout = vi.TokenLayout(3, 4, 1)
    given = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
    maps = maps_of_kernel(given, layout)
    assert maps.shape == (2, 12, 12)
    np.testing.assert_allclose(kernel(jnp.asarray(maps), layout), given, rtol=1e-5)


@pytest.mark.slow
def test_a_teacher_that_is_asked_every_time(tmp_path):
    teacher = tmp_path / "teacher"
    plain = run(teacher, winft__windows="", checkpoint__export="last")
    lines = run(
        tmp_path / "run", winft__windows="teacher", winft__teacher=str(teacher),
        winft__coverage=0.4, winft__indicator="attention", eval__every=2,
    )  # fmt: skip
    assert lines[0]["train/loss"] != plain[0]["train/loss"]
    assert (tmp_path / "run" / "val.json").exists()


def test_layers_and_groups(model, params):
    found = planned(model, params, winft__windows="predicted", winft__layers=(1,), winft__groups=2)
    assert found.guide.layers == (1,) and found.model.config.windows.groups == 2
    blocks = found.params["Transformer"]
    assert ["WindowHead_0" in blocks[f"encoderblock_{i}"] for i in range(LAYERS)] == [False, True]
    plain, theirs = without_windows(found.model, found.params)
    assert plain.config == model.config
    jax.tree.map(np.testing.assert_array_equal, theirs, params)


def test_schedules(model):
    found = planned(
        model, winft__windows="predicted", winft__sharpness=(1.0, 0.01), winft__weight=(2.0, 0.0)
    )
    assert [float(found.sharpness(step)) for step in (0, 5, 10)] == pytest.approx([1, 0.1, 0.01])
    assert [float(found.weight(step)) for step in (0, 5, 10)] == pytest.approx([2, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "fsdp", "tensor"])
def test_devices_change_nothing(tmp_path, strategy):
    settings = {"winft__every": 2, "winft__indicator": "attention", "steps": 3}
    curves = []
    for name, devices in (("one", 1), ("all", 8)):
        config = tiny.config(winft__windows="predicted", sharding__strategy=strategy, **settings)
        train(config, tmp_path / name, tiny.data(), devices=jax.devices()[:devices])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines if "train/loss" in line])
    for name in ("train/loss", "windows/guidance", "windows/area"):
        one, other = ([line[name] for line in curve] for curve in curves)
        np.testing.assert_allclose(other, one, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"winft__guide": "teacher"}, "config.winft.teacher is empty"),
        (
            {"winft__guide": "teacher", "winft__teacher": "vit_s14_caltech101"},
            "config.winft.teacher=vit_s14_caltech101: image height 16 is not a multiple",
        ),
        ({"winft__guide": "file"}, "config.winft.file is empty"),
        ({"winft__guide": "file", "winft__file": "nowhere"}, "there is no such store"),
        ({"winft__windows": "boxes"}, "config.winft.windows='boxes': expected one of"),
        ({"winft__layers": (5,)}, "config.winft.layers has \\[5\\]; the model has 2 layers"),
        ({"winft__every": 3}, "does not divide the 16 images"),
        ({"winft__sharpness": (1.0, 0.0)}, "expected more than 0"),
        ({"winft__sharpness": (1.0,)}, "expected two numbers"),
        ({"winft__coverage": 0.0}, "expected a share"),
        ({"winft__indicator": "magic"}, "magic"),
        ({"winft__windows": "local", "winft__size": (0, 3)}, "at least 1x1"),
    ],
)
def test_what_cannot_be(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, **changes)


def test_a_loaded_models_windows_are_not_replaced(model, params):
    ours, converted = to_winft(model, params, WindowConfig(groups=2))
    with pytest.raises(ValueError, match="has windows of its own"):
        planned(ours, converted, winft__windows="local")


@pytest.mark.slow
def test_pictures_of_windows(tmp_path):
    run(tmp_path, tensorboard=True, winft__indicator="attention", steps=8)
    from PIL import Image

    with Image.open(tmp_path / "windows.png") as picture:
        assert min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 50
    (events,) = (tmp_path / "tensorboard").iterdir()
    # One an epoch.
    assert events.read_bytes().count(b"PNG") == 2


@pytest.mark.slow
def test_guidance_by_one_in_eight_images_adds_less_than_a_tenth(model):
    flops = []
    wide = vi.create_model("vit_ti16", num_classes=10, image_size=112, depth=2)
    for guide in ("", "self"):
        plan = planned(wide, winft__windows="predicted", winft__guide=guide, winft__every=8)
        shapes = jax.eval_shape(plan.model.init, jax.random.key(0), jnp.zeros((1, 112, 112, 3)))
        frozen = frozen_leaves(shapes["params"], "")
        recipe = Recipe(
            plan.model, optax.sgd(0.1), frozen, Augment(None, flip=False), False,
            Preprocess(size=(112, 112)), 0, guide=plan.guide, weight=plan.weight,
        )  # fmt: skip
        state = jax.eval_shape(
            lambda params, recipe=recipe: begin(params, recipe.optimizer, False, recipe.nothing()),
            shapes["params"],
        )
        batch = {
            "pictures": jax.ShapeDtypeStruct((16, 112, 112, 3), jnp.uint8),
            "labels": jax.ShapeDtypeStruct((16,), jnp.int32),
            "mask": jax.ShapeDtypeStruct((16,), jnp.bool_),
        }
        cost = jax.jit(make_train_step(recipe)).lower(state, batch).compile().cost_analysis()
        flops.append(cost["flops"])
    assert flops[0] < flops[1] < 1.1 * flops[0]


@pytest.mark.parametrize("arm", ["vit", "free", "local", "taught", "nothing"])
def test_arms_differ_in_their_windows_only(arm):
    from configs import cifar10_cpu, winft_cifar10_cpu

    if arm == "nothing":
        with pytest.raises(ValueError, match="expected one of vit"):
            winft_cifar10_cpu.get_config(arm)
        return
    told = differences(
        as_json(cifar10_cpu.get_config()), as_json(winft_cifar10_cpu.get_config(arm))
    )
    assert all(line.startswith("config.winft.") for line in told)


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(tmp_path):
    settings = {"winft__indicator": "attention", "winft__sharpness": (1.0, 0.5), "steps": 4}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "parts", stop_after=2, **settings)
    parts = run(tmp_path / "parts", **settings)
    for name in ("train/loss", "windows/guidance", "windows/iou", "windows/area/layer_01"):
        assert [line[name] for line in parts] == [line[name] for line in whole]


def test_frozen_windows_are_told(model):
    plan = planned(model, winft__windows="predicted")
    shapes = jax.eval_shape(plan.model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    for pattern, told in (("encoderblock_0/", "layers 0;"), ("encoderblock_0/Mlp", None)):
        lines = frozen_windows(plan.model, frozen_leaves(shapes["params"], pattern))
        assert [told in line for line in lines] == ([True] if told else [])
