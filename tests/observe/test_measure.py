import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vit_interact as vi
from tests.models.helpers import applied, stacked, tiny
from tests.models.layers import close
from tests.models.test_vit import FAMILY
from vit_interact import interactions as vx
from vit_interact.models.attention import Taps
from vit_interact.models.vit import ViT
from vit_interact.observe.measure import measure_with_logits

ALL = tuple(vx.INDICATORS)


@pytest.mark.parametrize("member", [{}, {"distilled": True, "pos_prefix": 2, "layer_scale": 0.5}])
def test_measure_equals_compute_of_captures(member):
    model, params, images = tiny(**member)
    maps = vi.measure(model, params, images, indicators=ALL)
    captures = vi.capture(model, params, images)
    assert list(maps) == list(ALL)
    for name in ALL:
        tokens = model.config.layout.num_tokens
        assert maps[name].shape == (3, 2, tokens, tokens)
        close(maps[name], jax.jit(functools.partial(vx.compute, name))(captures))


@pytest.mark.parametrize("indicator", ["leave_one_out", "edge"])
def test_layers_share_the_traces_of_their_parts(indicator):
    """A deeper model has no more functions within its program: each was traced once."""

    def functions(depth):
        model, params, images = tiny(depth=depth)
        measure = jax.jit(lambda params: vi.measure(model, params, images, indicator))
        return measure.lower(params).as_text().count("func.func")

    # The first layer has nothing below it that has a derivative, the last one tokens nobody reads.
    assert functions(3) == functions(4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scan": True}, marks=pytest.mark.slow),
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        pytest.param({"scan": True, "remat": True}, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_measure_and_capture_the_same(options):
    model, params, images = tiny(layer_scale=0.5)
    other = ViT(dataclasses.replace(model.config, **options))
    other_params = stacked(params) if options.get("scan") else params
    for layers in (None, (0, 2)):
        maps = vi.measure(model, params, images, ALL, layers=layers)
        others = vi.measure(other, other_params, images, ALL, layers=layers)
        for name in ALL:
            close(others[name], maps[name])
    own = vi.capture(model, params, images)
    theirs = vi.capture(other, other_params, images)
    for a, b in zip(own, theirs, strict=True):
        close(b, a)


def test_gradient_is_the_derivative_of_the_score():
    """`g` against adding a small change to one head's output by hand."""
    model, params, images = tiny(layer_scale=0.7)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        # Empty taps: the explicit path, since the fused one has a float32 softmax.
        exact = ViT(dataclasses.replace(model.config, dtype="float64"), taps=Taps())
        pictures = jnp.asarray(images, jnp.float64)
        captures = vi.capture(exact, wide, pictures, score=3)
        # A change dv of every value of layer 1's head changes the score by sum_ij A_ij g_i · dv_j.
        change = 1e-6 * np.random.default_rng(0).normal(size=model.config.head_dim)
        block = wide["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]
        moved = jax.tree.map(lambda a: a, wide)
        value = moved["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]["value"]
        value["bias"] = block["value"]["bias"].at[2].add(change)
        before = applied(exact, wide, pictures)[:, 3]
        after = applied(exact, moved, pictures)[:, 3]
        weights, grad = captures.weights[1, :, 2], captures.output_grad[1, :, :, 2]
        predicted = jnp.einsum("bij,bik,k->b", weights, grad, change)
        np.testing.assert_allclose(after - before, predicted, rtol=1e-4)


def test_scores():
    model, params, images = tiny(batch=3)
    logits = applied(model, params, images)
    top = jnp.argmax(logits, axis=-1)
    edge = functools.partial(vi.measure, model, params, images, ("edge",))
    predicted = edge(score="predicted")["edge"]
    close(edge(score=top)["edge"], predicted)
    close(edge(score=lambda z: z.max(-1))["edge"], predicted)
    close(edge(score=2)["edge"], edge(score=np.array([2, 2, 2]))["edge"])
    assert np.abs(edge(score=0)["edge"] - edge(score=1)["edge"]).max() > 1e-3
    with pytest.raises(ValueError, match="one for each image"):
        edge(score=np.array([1, 2]))
    with pytest.raises(ValueError, match="expected 'predicted'"):
        edge(score="best")
    with pytest.raises(ValueError, match="one number for each of 3 images"):
        edge(score=lambda z: z)


def test_last_layer_patch_rows_are_zero_with_a_class_head():
    model, params, images = tiny()
    maps = vi.measure(model, params, images, ("edge", "gradient"))
    for name in maps:
        assert (np.asarray(maps[name])[-1, :, 1:] == 0).all()
        assert (np.asarray(maps[name])[-1, :, 0] != 0).any()


def test_layers_are_chosen_and_checked():
    model, params, images = tiny()
    whole = vi.measure(model, params, images, ALL)
    part = vi.measure(model, params, images, ALL, layers=(-1, 0))
    for name in ALL:
        close(part[name], whole[name][jnp.array([0, 2])])
    with pytest.raises(ValueError, match=r"layers \[3\]: the model has layers 0 to 2"):
        vi.measure(model, params, images, layers=(0, 3))
    with pytest.raises(ValueError, match="each one once"):
        vi.measure(model, params, images, layers=(2, -1))
    with pytest.raises(ValueError, match="unknown indicator 'x'"):
        vi.measure(model, params, images, ("x",))


@pytest.mark.slow
def test_batch_order_does_not_matter():
    model, params, images = tiny(batch=4)
    order = jnp.array([2, 0, 3, 1])
    maps = vi.measure(model, params, images, ALL)
    shuffled = vi.measure(model, params, images[order], ALL)
    for name in ALL:
        close(shuffled[name], maps[name][:, order])


def test_traceable_and_compiled_once():
    model, params, images = tiny()
    traces = []

    @jax.jit
    def outer(params, images, classes):
        traces.append(1)
        maps = vi.measure(model, params, images, ("edge", "attention"), score=classes)
        return maps["edge"].mean(), maps["attention"]

    for target in (0, 1, 2):
        outer(params, images, jnp.full(2, target))
    assert len(traces) == 1
    expected = vi.measure(model, params, images, ("edge",), score=2)["edge"].mean()
    close(outer(params, images, jnp.full(2, 2))[0], expected)


def test_measure_is_differentiable():
    """A loss on an indicator, as in training: gradients reach the parameters and are finite."""
    model, params, images = tiny()

    def loss(params):
        maps = vi.measure(model, params, images, ("leave_one_out", "edge"))
        return maps["leave_one_out"].mean() + maps["edge"].mean()

    grads = jax.grad(loss)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    key = grads["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]["key"]
    assert np.abs(key["kernel"]).max() > 0


def test_sharded_images_give_sharded_maps():
    """In float64: a program for one image rounds otherwise, and A/(1-A) makes much of it."""
    model, params, images = tiny(batch=8)
    with jax.enable_x64(True):
        model = ViT(dataclasses.replace(model.config, dtype="float64"))
        params, images = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, images))
        expected = vi.measure(model, params, images, ALL)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
        replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        maps = vi.measure(model, replicated, placed, ALL)
    for name in ALL:
        assert len(maps[name].sharding.device_set) == 8
        close(maps[name], expected[name])


def test_bf16_compute_is_close():
    model, params, images = tiny()
    half = ViT(dataclasses.replace(model.config, dtype="bfloat16"))
    exact = vi.measure(model, params, images, ("attention", "leave_one_out"))
    rough = vi.measure(half, params, images, ("attention", "leave_one_out"))
    for name in exact:
        assert rough[name].dtype == jnp.float32
        close(rough[name], exact[name], tolerance=0.1)


@pytest.mark.parametrize(
    ("indicator", "batch"),
    [
        pytest.param("attention", 8, marks=pytest.mark.slow),
        ("leave_one_out", 8),
        pytest.param("leave_one_out", 1, marks=pytest.mark.slow),
        pytest.param("value_norm", 1, marks=pytest.mark.slow),
    ],
)
def test_temporary_memory_is_that_of_the_forward_pass(indicator, batch):
    """vit_s16 at 224, all layers; the maps themselves are outputs, not temporaries."""
    model = vi.create_model("vit_s16")
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def temporary(function):
        compiled = jax.jit(function).lower(params, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    forward = temporary(lambda p, x: model.apply({"params": p}, x))
    measured = temporary(lambda p, x: vi.measure(model, p, x, (indicator,)))
    assert measured < 1.3 * forward


def test_capture_gives_what_is_asked_and_says_how_large(caplog):
    model, params, images = tiny()
    with caplog.at_level(logging.INFO, logger="vit_interact"):
        captures = vi.capture(model, params, images, need=("weights",), layers=(1,))
    assert "capture holds" in caplog.text
    assert captures.values is None and captures.output_grad is None
    assert captures.weights.shape == (1, 2, 3, 13, 13)
    kernel = params["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]["out"]
    np.testing.assert_array_equal(captures.out_kernel[0], kernel["kernel"])
    with pytest.raises(ValueError, match=r"cannot capture \['gates'\]"):
        vi.capture(model, params, images, need=("gates",))


def test_empty_taps_take_the_explicit_path():
    model, params, images = tiny()
    explicit = applied(model.clone(taps=Taps()), params, images)
    np.testing.assert_allclose(explicit, applied(model, params, images), atol=1e-5)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kept_patches_are_measured_as_the_model_runs_on_them(scan):
    model, params, images = tiny(scan=scan)
    names = ("attention", "gradient", "edge")
    everything = np.tile(np.arange(model.config.layout.num_patches, dtype=np.int32), (2, 1))
    whole = vi.measure(model, params, images, names)
    for name, maps in vi.measure(model, params, images, names, keep=everything).items():
        np.testing.assert_allclose(maps, whole[name], atol=1e-6)
    keep = np.array([[0, 3, 7], [1, 2, 11]], np.int32)
    logits, maps = measure_with_logits(model, params, images, names, keep=keep)
    np.testing.assert_allclose(logits, applied(model, params, images, keep=keep), atol=1e-5)
    assert maps["edge"].shape == (3, 2, 4, 4)
    # The first layer's attention is that of the whole model, over fewer keys.
    seen = np.concatenate([np.zeros((2, 1), int), 1 + keep], axis=1)
    weights = vi.capture(model, params, images, need=("weights",), layers=(0,)).weights[0]
    rows = np.stack([np.asarray(w)[:, s][:, :, s] for w, s in zip(weights, seen, strict=True)])
    expected = (rows / rows.sum(-1, keepdims=True)).mean(1)
    np.testing.assert_allclose(maps["attention"][0], expected, atol=1e-5)


def test_masked_attention_is_measured_as_the_model_runs_under_the_mask():
    model, params, images = tiny()
    layout = model.config.layout
    boxes = np.tile(np.array([0, 0, 2, 3], np.int32), (layout.num_patches, 1))
    mask = vx.window_mask(boxes, layout)
    names = ("attention", "leave_one_out", "gradient", "edge")
    logits, maps = measure_with_logits(model, params, images, names, mask=mask)
    expected = applied(model, params, images, mask=mask)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for name in names:
        assert (np.asarray(maps[name])[:, :, ~np.asarray(mask)] == 0).all(), name
    # The first layer reads the same tokens with and without the mask.
    weights = vi.capture(model, params, images, need=("weights",), layers=(0,)).weights[0]
    rows = np.asarray(weights) * np.asarray(mask)
    expected = (rows / rows.sum(-1, keepdims=True)).mean(1)
    np.testing.assert_allclose(maps["attention"][0], expected, atol=1e-5)
    in_blocks = vi.measure(model, params, images, names, mask=[mask, None, mask], block=4)
    at_once = vi.measure(model, params, images, names, mask=[mask, None, mask])
    for name in names:
        close(in_blocks[name], at_once[name])


@pytest.mark.parametrize("member,block", [("vit", None), ("vit", 5), ("deit", None),
                                          ("swiglu", 5), ("clip", None)])  # fmt: skip
def test_the_last_layer_attends_for_what_is_read_alone(member, block):
    """Of a class token: what the score does not depend on has no gradient, and no weights."""
    model, params, images = tiny(**FAMILY[member])
    names = ("gradient", "edge")
    tokens = model.config.layout.num_tokens
    mask = jnp.asarray(np.random.default_rng(0).random((2, 3, tokens, tokens)) < 0.7)
    for given in (None, mask) if member == "vit" else (mask,):
        alone = vi.measure(model, params, images, names, mask=given, block=block)
        # With one that is of the forward pass, all queries of each layer are attended for.
        whole = vi.measure(model, params, images, ("attention", *names), mask=given, block=block)
        for name in names:
            close(alone[name], whole[name])
            assert np.abs(alone[name][-1]).max() > 0
    assert not np.abs(alone["edge"][-1, :, model.config.tokens_read :]).max()


def test_the_last_layer_costs_a_gradient_little():
    flops = {}
    for names in (("gradient",), ("attention", "gradient")):
        for depth in (2, 3):
            model, params, images = tiny(depth=depth, image_size=(32, 32))
            measure = jax.jit(lambda p, x, m=model, n=names: vi.measure(m, p, x, n)["gradient"])
            cost = measure.lower(params, images).compile().cost_analysis()
            flops[len(names), depth] = cost["flops"]
    layer = flops[1, 3] - flops[1, 2]
    assert flops[2, 3] - flops[1, 3] > 0.15 * layer
