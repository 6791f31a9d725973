"""Configs, schedules, update rules and meshes, against figures worked out by hand."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import vit_interact as vi
from tests.train import tiny
from vit_interact.models.config import ViTConfig, WindowConfig
from vit_interact.train import optimizer, speed
from vit_interact.train.config import (
    as_json,
    check_config,
    completed,
    default_config,
    differences,
)
from vit_interact.train.evaluate import BINS, Evaluation
from vit_interact.train.optimizer import make_optimizer, make_schedule, rate_factors
from vit_interact.train.sharding import check_mesh, make_mesh, spec_of, state_sharding
from vit_interact.train.state import param_shapes
from vit_interact.train.train import train


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "config.batch_size=0"),
        ({"loss__smoothing": 1.5}, "config.loss.smoothing=1.5"),
        ({"optimizer__name": "adam"}, "expected one of adamw, sgd, lion"),
        ({"optimizer__accumulate": 3}, "not a multiple of config.optimizer.accumulate=3"),
        ({"data__holdout": 0.1}, "not both"),
        ({"batch_size": 65}, "more than the 64 images"),
        ({"batch_size": 20}, "does not divide over 8 devices .*; the next that does is 24"),
        ({"sharding__model": 3}, "8 devices do not divide"),
        ({"sharding__model": 8, "model__fields": {**tiny.FIELDS, "heads": 4}}, "4 heads"),
        ({"model__fields": {"widht": 3}}, "unknown model settings"),
        ({"model__name": "vit_s17"}, "did you mean"),
        ({"optimizer__freeze": "nothing_like_this"}, "matches no parameter"),
        ({"optimizer__freeze": "."}, "freezes every parameter"),
        ({"optimizer__freeze": "("}, "config.optimizer.freeze"),
        ({"schedule__warmup": 50.0}, "config.schedule.warmup=50.0"),
        ({"augment__crop": (0.0, 2.0)}, "augment.crop"),
        ({"data__cache": "device", "augment__where": "host"}, "config.data.cache=device"),
        ({"data__val": "holdout"}, "no split 'holdout'"),
        ({"init": "nowhere.safetensors"}, "no such file"),
        ({"distill__teacher": "nowhere.safetensors"}, "no such file"),
        ({"eval_only": True}, "has no checkpoint, config.init is empty"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        train(tiny.config(**changes), tmp_path / "run", tiny.data())
    assert "\n" not in str(caught.value)


def test_misspelt_and_mistyped_settings_are_named():
    settings = tiny.config()
    with settings.unlocked():
        settings.optimizer.wieght_decay = 0.1
    with pytest.raises(ValueError, match=r"did you mean config\.optimizer\.weight_decay"):
        check_config(settings)
    with settings.unlocked():
        del settings.optimizer["wieght_decay"]
    with settings.ignore_type():
        settings.epochs = "ten"
    with pytest.raises(ValueError, match=r"config\.epochs='ten' is a str; expected float"):
        check_config(settings)
    check_config(default_config())


def test_an_unwritable_workdir_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="--workdir"):
        train(tiny.config(), file, tiny.data())


def test_differences_leave_out_what_changes_no_number():
    one = as_json(default_config())
    other = default_config()
    other.log_every, other.data.workers, other.checkpoint.keep_last = 1, 7, 9
    assert differences(one, as_json(other)) == []
    other.model.name = "vit_b16"
    assert differences(one, as_json(other)) == ["config.model.name: 'vit_s16', now 'vit_b16'"]


def test_a_setting_that_an_older_config_lacks_is_its_default():
    now = default_config()
    older = as_json(now)
    del older["winft"]["detach"]
    assert differences(older, as_json(now)) != []
    assert differences(completed(older), as_json(now)) == []
    now.winft.detach = True
    assert differences(completed(older), as_json(now)) == ["config.winft.detach: False, now True"]


def test_schedules():
    settings = ConfigDict({"kind": "cosine", "rate": 2.0, "warmup": 2.0, "final": 0.5})
    rate = make_schedule(settings, 30, 5.0)
    assert float(rate(0)) == 0 and float(rate(5)) == pytest.approx(1)
    assert float(rate(10)) == pytest.approx(2)
    assert float(rate(20)) == pytest.approx(1.25) and float(rate(30)) == pytest.approx(0.5)
    settings.kind = "linear"
    assert float(make_schedule(settings, 30, 5.0)(15)) == pytest.approx(1.625)


def optimizer_settings(**changes):
    found = default_config().optimizer
    found.update(changes)
    return found


def test_rates_by_layer_decay_and_freezing():
    model = vi.create_model(
        "vit_ti16", num_classes=3, image_size=16, patch_size=8, width=8, depth=2, heads=2, mlp_dim=8
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    settings = optimizer_settings(
        name="sgd", momentum=0.0, clip=0.0, layer_decay=0.5, head_rate=10.0, weight_decay=0.1,
        freeze="^cls$",
    )  # fmt: skip
    rule = make_optimizer(settings, lambda step: 1.0, params, 2)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = rule.update(grads, rule.init(params), params)
    block = updates["Transformer"]["encoderblock_0"]["LayerNorm_0"]["scale"]
    np.testing.assert_allclose(block, -0.25)
    np.testing.assert_allclose(updates["pos_embedding"], -0.125)
    np.testing.assert_allclose(updates["cls"], 0)
    np.testing.assert_allclose(updates["head"]["bias"], -10)
    # Decay is part of the update, so it has the layer's rate, too.
    kernel = params["head"]["kernel"]
    np.testing.assert_allclose(updates["head"]["kernel"], -10 * (1 + 0.1 * kernel), rtol=1e-6)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert params["cls"].shape not in shapes  # nothing is kept for what is frozen


def test_a_scanned_model_has_the_rates_of_a_looped_one():
    fields = {"width": 8, "depth": 3, "heads": 2, "mlp_dim": 8, "image_size": 16}
    looped, scanned = (
        rate_factors(param_shapes(vi.create_model("vit_ti16", scan=scan, **fields)), 3, 0.5, 1.0)
        for scan in (False, True)
    )
    stacked = scanned["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    each = [looped["Transformer"][f"encoderblock_{i}"] for i in range(3)]
    expected = [block["MlpBlock_0"]["Dense_0"]["kernel"] for block in each]
    np.testing.assert_allclose(stacked.ravel(), expected)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_update_rules_are_optax_s_own(name):
    params = {"head": {"kernel": jnp.array([1.0, -2.0, 3.0])}}
    settings = optimizer_settings(name=name, clip=0.0, weight_decay=0.1)
    ours = make_optimizer(settings, optax.constant_schedule(0.01), params, 1)
    theirs = {
        "adamw": optax.adamw(0.01, weight_decay=0.1),
        "lion": optax.lion(0.01, b2=0.999, weight_decay=0.1),
        "sgd": optax.chain(
            optax.trace(0.9, nesterov=True),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(0.01),
        ),
    }[name]
    found = []
    for rule in (ours, theirs):
        state, own = rule.init(params), params
        for step in range(3):
            grads = jax.tree.map(lambda leaf, step=step: jnp.sin(leaf + step), own)
            updates, state = rule.update(grads, state, own)
            own = optax.apply_updates(own, updates)
        found.append(own["head"]["kernel"])
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.5, 50.0])
def test_one_norm_for_leaves_of_one_shape(clip, monkeypatch):
    """On accelerators; clipping by it is optax's."""
    monkeypatch.setattr(optimizer, "on_cpu", lambda: False)
    shapes = {"a": (3, 4), "b": (3, 4), "c": (5,), "d": (), "e": (5,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    np.testing.assert_allclose(optimizer.global_norm(grads), optax.tree.norm(grads), rtol=1e-6)
    reductions = str(jax.make_jaxpr(optimizer.global_norm)(grads)).count("reduce_sum")
    assert reductions == len(set(shapes.values()))
    theirs = optax.clip_by_global_norm(clip)
    ours = optimizer._clip_by_norm(clip)
    assert ours.init(grads) == theirs.init(grads)  # checkpoints fit
    found, expected = (rule.update(grads, rule.init(grads))[0] for rule in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_where_parameters_lie():
    mesh = make_mesh("tensor", fsdp=2, model=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
    block = "params/Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    specs = {
        f"{attention}/query/kernel": ((384, 6, 64), ("fsdp", "model", None)),
        f"{attention}/out/kernel": ((6, 64, 384), ("model", None, "fsdp")),
        f"opt_state/0/mu/{block}/MlpBlock_0/Dense_0/kernel": ((384, 1536), ("fsdp", "model")),
        f"{block}/MlpBlock_0/Dense_1/kernel": ((1536, 384), ("model", "fsdp")),
        f"{block}/LayerNorm_0/scale": ((384,), (None,)),
        "params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (
            (12, 384, 1536), (None, "fsdp", "model"),
        ),
    }  # fmt: skip
    for path, (shape, expected) in specs.items():
        assert tuple(spec_of(path, shape, mesh)) == expected, path
    with pytest.raises(ValueError, match="3 heads"):
        check_mesh(mesh, 8, 1, 3)


def test_fsdp_spreads_the_state():
    model = vi.create_model("vit_s16", num_classes=10, image_size=32)
    shapes = param_shapes(model)
    shardings = state_sharding(shapes, make_mesh("fsdp"))
    whole = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    pieces = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, shardings)
    part = sum(
        np.prod(shape) for shape in jax.tree.leaves(pieces, is_leaf=lambda x: isinstance(x, tuple))
    )
    assert part < 1.05 * whole / 8


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("windows", [None, WindowConfig(layers=(1,))])
def test_flops_are_xlas_own(train, windows):
    fields = {"num_classes": 10, "image_size": 64, "depth": 2}
    model = vi.create_model("vit_ti16", windows=windows, **fields)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images, train=train))
    cost = apply.lower(param_shapes(model), images).compile().cost_analysis()
    ours = speed.forward_flops(model.config, train)
    # XLA counts norms, softmax and GELU, too.
    assert ours < cost["flops"] < 1.1 * ours


def test_flops_of_a_step():
    model = vi.create_model("vit_ti16", num_classes=10, image_size=64)
    ours = speed.forward_flops(model.config, train=True)
    frozen = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: "head" not in jax.tree_util.keystr(keys), param_shapes(model)
    )
    assert speed.step_flops(model.config) == 3 * ours
    assert speed.step_flops(model.config, frozen) == pytest.approx(ours)


def test_evaluation_against_numpy():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 7)).astype(np.float32) * 2
    labels = generator.integers(0, 7, 50).astype(np.int32)
    mask = generator.random(50) < 0.8
    parts = [
        Evaluation.of(jnp.asarray(logits[i]), jnp.asarray(labels[i]), jnp.asarray(mask[i]))
        for i in (slice(0, 20), slice(20, 50))
    ]
    found = parts[0].merge(parts[1]).compute()
    logits, labels = logits[mask].astype(float), labels[mask]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best, sure = p.argmax(axis=1), p.max(axis=1)
    assert found["examples"] == mask.sum()
    assert found["accuracy"] == pytest.approx((best == labels).mean())
    order = np.argsort(-logits, axis=1)[:, :5]
    assert found["top5"] == pytest.approx((order == labels[:, None]).any(axis=1).mean())
    expected = -np.log(p[np.arange(len(p)), labels]).mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    bins = np.ceil(sure * BINS).astype(int) - 1
    gaps = [abs((sure - (best == labels))[bins == b].sum()) for b in range(BINS)]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / len(p), rel=1e-4)
    assert found["confusion"][labels[0], best[0]] >= 1
    with pytest.raises(ValueError, match="no photograph"):
        jax.tree.map(jnp.zeros_like, parts[0]).compute()


CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem != "common"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_sound_and_says_how_it_is_run(name):
    import importlib

    module = importlib.import_module(f"configs.{name}")
    settings, text = module.get_config(), module.__doc__
    if "--config.init=" in text:
        settings.init = "weights"
    check_config(settings)
    assert f"--config=configs/{name}.py" in text
    assert "Hardware" in text and "esult" in text


def test_window_heads_are_counted():
    plain = {"image_size": (32, 32), "patch_size": (4, 4), "width": 8, "heads": 2, "depth": 3}
    counts = [
        speed.forward_flops(ViTConfig(**plain, windows=windows))
        for windows in (None, WindowConfig(layers=(0, 2), groups=2), WindowConfig(kind="given"))
    ]
    # 2 layers, 64 patches, 8 wide, 4 distances for each of 2 groups.
    assert counts[1] - counts[0] == 2 * 2 * 64 * 8 * 8 and counts[2] == counts[0]
