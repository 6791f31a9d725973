"""The window-free transformer: what it starts as, and what its windows do."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import applied
from vit_interact import interactions as vx
from vit_interact.interactions.boxes import hard_windows
from vit_interact.interactions.controls import local_windows, shifted_windows
from vit_interact.models import attend, winft
from vit_interact.models.attention import Taps
from vit_interact.models.config import ViTConfig, WindowConfig
from vit_interact.models.weights import stack_layers
from vit_interact.models.winft import give_windows, to_winft, without_windows

FIELDS = {"width": 16, "depth": 3, "heads": 4, "mlp_dim": 16, "patch_size": (4, 4)}


@functools.cache
def make(seed=0, name="vit_ti16", **fields):
    settings = {**FIELDS, "image_size": (16, 20), "num_classes": 5, **fields}
    model = vi.create_model(name, **settings)
    keys = jax.random.split(jax.random.key(seed), 3)
    images = jax.random.normal(keys[0], (2, *model.config.image_size, 3))
    params = model.init(keys[1], images)["params"]
    # Weights of some size, so that attention is not uniform and heads are not zero.
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(keys[2], len(leaves))
    pairs = zip(leaves, noise, strict=True)
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in pairs]
    return model, jax.tree.unflatten(tree, moved), images


def turned(params, size=0.5, seed=5):
    """Window heads that have learned something."""

    def turn(keys, leaf):
        if "WindowHead_0" not in jax.tree_util.keystr(keys):
            return leaf
        return size * jax.random.normal(jax.random.key(seed), leaf.shape) - 1.0 * (leaf.ndim == 1)

    return jax.tree_util.tree_map_with_path(turn, params)


# One program: op by op, each operation of a new shape is one of its own.
predicted_distances = jax.jit(winft.predicted_distances, static_argnums=0)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_ti16", {}),
        ("vit_ti16", {"pool": "gap", "cls_token": False, "pos_prefix": 0}),
        pytest.param("deit_ti16_distilled", {}, marks=pytest.mark.slow),
        pytest.param("dinov2_s14_reg", {}, marks=pytest.mark.slow),
        pytest.param("clip_b32", {}, marks=pytest.mark.slow),
    ],
)
def test_a_converted_model_starts_as_the_model(name, fields):
    model, params, images = make(name=name, **fields)
    plain = applied(model, params, images)
    ours, converted = to_winft(model, params)
    found = applied(ours, converted, images)
    assert float(jnp.abs(found - plain).max()) < 1e-3 * float(jnp.abs(plain).max())
    # And so do the hard windows, which hold the whole grid.
    hard = ours.clone(config=dataclasses.replace(ours.config, windows=WindowConfig(hard=True)))
    np.testing.assert_allclose(applied(hard, converted, images), plain, atol=2e-5)


def test_the_embedded_model_starts_as_itself():
    model, params = vi.load_model("vit_s14_caltech101")
    images = jax.random.normal(jax.random.key(0), (1, 224, 224, 3))
    plain, found = applied(model, params, images), applied(*to_winft(model, params), images)
    assert float(jnp.abs(found - plain).max()) < 1e-3 * float(jnp.abs(plain).max())


def test_hard_windows_are_a_mask_made_by_hand():
    model, params, images = make()
    ours, params = to_winft(model, params, WindowConfig(hard=True))
    params = turned(params)
    logits, distances = predicted_distances(ours, params, images)
    layout = model.config.layout
    assert distances.shape == (3, 2, 1, layout.num_patches, 4)
    masks = vx.window_mask(hard_windows(distances, layout), layout)
    assert 0.1 < float(masks.mean()) < 0.95
    # The windows of a layer depend on what the layers below attended to.
    found = applied(model, _without_heads(params), images, mask=[masks[i] for i in range(3)])
    np.testing.assert_allclose(found, logits, atol=1e-5)


def _without_heads(params):
    encoder = {
        name: {k: v for k, v in block.items() if k != "WindowHead_0"}
        for name, block in params["Transformer"].items()
    }
    return {**params, "Transformer": encoder}


def test_soft_windows_sharpen_into_hard_ones():
    model, params, images = make()
    ours, params = to_winft(model, params)
    params = turned(params)
    hard = ours.clone(config=dataclasses.replace(ours.config, windows=WindowConfig(hard=True)))
    expected = applied(hard, params, images)
    run = jax.jit(lambda tau: applied(ours, params, images, sharpness=tau))
    errors = [float(jnp.abs(run(tau) - expected).max()) for tau in (1.0, 0.1, 1e-5)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


@pytest.mark.slow
def test_gradients_reach_the_window_heads():
    model, params, images = make()
    with jax.enable_x64(True):
        ours, params = to_winft(model, params, WindowConfig(groups=2))
        ours = ours.clone(config=dataclasses.replace(ours.config, dtype="float64"))
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
        params = turned(params)
        images = jnp.asarray(np.asarray(images), jnp.float64)

        def loss(params):
            return jnp.sum(jnp.sin(applied(ours, params, images)))

        gradient = jax.grad(loss)(params)
        direction = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: (
                jax.random.normal(jax.random.key(len(str(keys))), leaf.shape)
                * ("WindowHead_0" in jax.tree_util.keystr(keys))
            ),
            params,
        )
        slope = sum(
            float((g * d).sum())
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        step = 1e-4
        ends = [
            float(loss(jax.tree.map(lambda p, d, h=h: p + h * d, params, direction)))
            for h in (step, -step)
        ]
        # The head itself computes in float32.
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2)
        assert abs(slope) > 1e-4


@pytest.mark.parametrize("detach", [False, True])
def test_detached_windows_leave_the_tokens_alone(detach):
    model, params, images = make()
    model, params = to_winft(model, params, WindowConfig(detach=detach))
    params = turned(params)
    loss = lambda params: jnp.sum(predicted_distances(model, params, images)[1] ** 2)  # noqa: E731
    slopes = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
    moved = {"WindowHead_0" in jax.tree_util.keystr(keys) for keys, leaf in slopes if leaf.any()}
    assert moved == ({True} if detach else {True, False})


def test_groups_of_heads_have_windows_of_their_own():
    model, params, images = make()
    ours, params = to_winft(model, params, WindowConfig(groups=2))
    params = turned(params)
    _, distances = predicted_distances(ours, params, images)
    assert distances.shape[2] == 2
    assert float(jnp.abs(distances[:, :, 0] - distances[:, :, 1]).max()) > 0.1


def test_some_layers_only():
    model, params, images = make()
    ours, params = to_winft(model, params, WindowConfig(layers=(1,)))
    blocks = params["Transformer"]
    assert ["WindowHead_0" in blocks[f"encoderblock_{i}"] for i in range(3)] == [False, True, False]
    assert predicted_distances(ours, params, images)[1].shape[0] == 1


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_and_recomputed_models_are_the_same(remat):
    model, params, images = make()
    ours, params = to_winft(model, params)
    params = turned(params)
    expected, distances = predicted_distances(ours, params, images, sharpness=0.7)
    other = ours.clone(config=dataclasses.replace(ours.config, scan=True, remat=remat))
    found, theirs = predicted_distances(other, stack_layers(params), images, sharpness=0.7)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(theirs, distances, atol=1e-5)
    converted = to_winft(
        model.clone(config=dataclasses.replace(model.config, scan=True, remat=remat)),
        stack_layers(_without_heads(params)),
    )[1]
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (converted, stack_layers(params))]
    assert shapes[0] == shapes[1]


def test_half_precision_is_near():
    model, params, images = make()
    ours, params = to_winft(model, params)
    params = turned(params)
    half = ours.clone(config=dataclasses.replace(ours.config, dtype="bfloat16"))
    exact, found = (applied(m, params, images) for m in (ours, half))
    assert found.dtype == jnp.bfloat16
    assert float(jnp.abs(found - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_training_takes_little_more_memory_than_explicit_attention(fields):
    # Of the mean of all tokens: with taps, the last block would make the class token alone.
    fields = {"image_size": 160, "heads": 3, "depth": 2, "num_classes": 10, "pool": "gap", **fields}
    model = vi.create_model("vit_ti16", **fields)
    ours = vi.create_model("vit_ti16", windows=WindowConfig(), **fields)
    images = jax.ShapeDtypeStruct((8, 160, 160, 3), jnp.float32)

    def held(model):
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

        def loss(params, images):
            return jnp.sum(jnp.square(applied(model, params, images).astype(jnp.float32)))

        compiled = jax.jit(jax.grad(loss)).lower(params, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(ours) < 1.15 * held(model.clone(taps=Taps()))


@pytest.mark.slow
def test_many_tokens_are_worked_on_in_blocks(monkeypatch):
    model, params, images = make(image_size=(64, 96), depth=1, windows=WindowConfig())
    params = turned(params)

    def loss(params):
        return jnp.sum(jnp.square(applied(model, params, images)))

    def compiled():
        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    whole = compiled()
    monkeypatch.setattr(attend, "WEIGHT_BYTES", 2**19)
    monkeypatch.setattr(attend, "SMALLEST_BLOCK", 32)
    blocks = compiled()
    held = [program.memory_analysis().temp_size_in_bytes for program in (whole, blocks)]
    assert held[1] < 0.5 * held[0]
    one, other = (
        jax.tree_util.tree_leaves_with_path(program(params)) for program in (whole, blocks)
    )
    largest = max(float(jnp.abs(leaf).max()) for _, leaf in one)
    for (path, a), (_, b) in zip(one, other, strict=True):
        if "'key']['bias']" in jax.tree_util.keystr(path):
            # It moves all logits of a row alike: its derivative is 0, and rounding.
            assert max(float(jnp.abs(leaf).max()) for leaf in (a, b)) < 1e-5 * largest
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def test_given_windows_are_a_mask():
    model, params, images = make()
    layout = model.config.layout
    ours, converted = to_winft(model, params, WindowConfig(kind="given", layers=(0, 2)))
    np.testing.assert_allclose(
        applied(ours, converted, images), applied(model, params, images), atol=1e-5
    )
    boxes = jnp.stack([local_windows((2, 3), layout), shifted_windows((2, 2), layout, (1, 1))])
    given = give_windows(ours, converted, boxes)
    masks = [vx.window_mask(boxes[0], layout), None, vx.window_mask(boxes[1], layout)]
    expected = applied(model, params, images, mask=masks)
    np.testing.assert_allclose(applied(ours, given, images), expected, atol=1e-5)
    count = sum(leaf.size for leaf in jax.tree.leaves(given))
    assert ours.config.count_parameters() == count
    # And nothing moves them.
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(applied(ours, p, images))))(given)
    block = gradient["Transformer"]["encoderblock_0"]
    assert not np.any(block["GivenWindows_0"]["windows"])
    with pytest.raises(ValueError, match="this model has \\(2, 20, 4\\)"):
        give_windows(ours, converted, boxes[:1])
    with pytest.raises(ValueError, match="no given windows"):
        give_windows(model, params, boxes)
    scanned = vi.create_model(
        "vit_ti16", **FIELDS, image_size=(16, 20), num_classes=5, scan=True,
        windows=WindowConfig(kind="given"),
    )  # fmt: skip
    three = jnp.stack([*boxes, boxes[0]])
    stacked = give_windows(scanned, stack_layers(params), three)
    masks = [vx.window_mask(box, layout) for box in three]
    np.testing.assert_allclose(
        applied(scanned, stacked, images), applied(model, params, images, mask=masks), atol=1e-5
    )


def test_windows_come_off_again():
    model, params, _ = make()
    for kind in ("predicted", "given"):
        ours, converted = to_winft(model, params, WindowConfig(kind=kind))
        plain, theirs = without_windows(ours, converted)
        assert plain.config == model.config
        jax.tree.map(np.testing.assert_array_equal, theirs, params)
        with pytest.raises(ValueError, match="windows already"):
            to_winft(ours, converted)


def test_indicators_see_the_windows():
    model, params, images = make()
    ours, params = to_winft(model, params, WindowConfig(hard=True))
    params = turned(params)
    layout = model.config.layout
    _, distances = predicted_distances(ours, params, images)
    outside = ~np.asarray(vx.window_mask(hard_windows(distances[:, :, 0], layout), layout))
    maps = vi.measure(ours, params, images, indicators=("attention", "edge"))
    for name in maps:
        assert (np.asarray(maps[name])[outside] == 0).all() and np.asarray(maps[name]).any()


@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("kind", ["predicted", "given"])
def test_saved_models_open_again(layers, kind, tmp_path):
    model, params, _ = make()
    windows = WindowConfig(layers=layers, kind=kind, groups=2 if kind == "predicted" else 1)
    ours, params = to_winft(model, params, windows)
    params = turned(params)
    vi.export_timm(ours, params, tmp_path / "winft.safetensors")
    again, theirs = vi.load_model(tmp_path / "winft.safetensors")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, theirs, params)


def test_settings_survive_json_and_parameters_are_counted():
    for layers, groups in itertools.product((None, (0, 2)), (1, 2)):
        model, params, _ = make()
        ours, params = to_winft(model, params, WindowConfig(layers=layers, groups=groups))
        again = ViTConfig.from_dict(json.loads(json.dumps(ours.config.to_dict())))
        assert again == ours.config and hash(again) == hash(ours.config)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert ours.config.count_parameters() == count


@pytest.mark.parametrize(
    ("windows", "fields", "words"),
    [
        ({"groups": 3}, {}, "not a multiple of 3 groups"),
        ({"layers": (7,)}, {}, "the model has 3 layers"),
        ({"layers": (1,)}, {"scan": True}, "has windows in all layers or in none"),
        ({"sharpness": 0.0}, {}, "more than 0"),
    ],
)
def test_what_cannot_be(windows, fields, words):
    with pytest.raises(ValueError, match=words):
        vi.create_model("vit_ti16", **FIELDS, **fields, windows=WindowConfig(**windows))
    model, params, images = make()
    with pytest.raises(ValueError, match="predicts no windows"):
        predicted_distances(model, params, images)
