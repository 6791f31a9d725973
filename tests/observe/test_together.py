"""`vi.measure` of some images of a batch at a time against all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import tiny
from tests.models.layers import close
from vit_interact.interactions.streaming import Fields
from vit_interact.observe import ways
from vit_interact.observe.measure import measure_with_logits

NAMES = ("leave_one_out", "edge", "rollout")  # forward, backward, and through the layers


@pytest.fixture
def five():
    model, params, _ = tiny(layer_scale=0.5)
    shape = (5, *model.config.image_size, 3)
    return model, params, np.random.default_rng(0).normal(size=shape).astype(np.float32)


def so_many(monkeypatch, model, images):
    """As on one device, with so many images together."""
    config = model.config
    most = 4 * images * config.layout.num_tokens * config.width
    monkeypatch.setattr(ways, "can_split_images", lambda: True)
    monkeypatch.setattr(ways, "_BYTES_TOGETHER", most)


def test_maps_and_logits_are_those_of_all(five, monkeypatch):
    """Five images two at a time: one of them twice."""
    model, _, _ = five
    keep = np.array([[0, 3, 7], [1, 2, 11], [2, 3, 4], [0, 1, 2], [9, 10, 11]], np.int32)
    calls = [
        dict(score=np.array([3, 0, 1, 2, 3]), indicators=NAMES),
        dict(keep=keep, indicators=("leave_one_out",)),
    ]
    expected = [measure_with_logits(*five, **call) for call in calls]
    so_many(monkeypatch, model, 2)
    assert ways.images_together(model, 5, None, None, None) == 2
    found = [measure_with_logits(*five, **call) for call in calls]
    jax.tree.map(close, found, expected)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)


@pytest.mark.parametrize("coverage", [0.7, (0.5, 0.9)])
def test_fields_are_those_of_all(five, monkeypatch, coverage):
    choice = dict(indicators=("attention",), layers=(1,), reduce="fields", coverage=coverage)
    expected = vi.measure(*five, **choice)
    so_many(monkeypatch, five[0], 1)
    found = vi.measure(*five, **choice)
    assert isinstance(found["attention"], Fields)
    jax.tree.map(lambda one, other: close(one, other, 1e-3), found, expected)


def test_derivatives_are_those_of_all(five, monkeypatch):
    model, params, images = five

    def total(images):
        return jnp.sum(vi.measure(model, params, images, ("attention",))["attention"] ** 2)

    expected = jax.grad(total)(images)
    so_many(monkeypatch, model, 1)
    close(jax.grad(total)(images), expected)


def test_how_many(five, monkeypatch):
    model = vi.create_model("vit_s16")
    assert ways.images_together(model, 32, None, None, None) == 32  # eight devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for images, together in ((0, 0), (1, 1), (16, 16), (17, 9), (20, 10), (32, 16), (33, 11)):
        assert ways.images_together(model, images, None, None, None) == together
    assert ways.images_together(vi.create_model("vit_b16"), 32, None, None, None) == 8
    large = vi.create_model("vit_s14", image_size=518)
    assert ways.images_together(large, 8, None, None, None) == 1
    assert ways.images_together(large, 8, jnp.zeros((8, 100), int), None, None) == 8
    # What may be of all images needs all images.
    assert ways.images_together(large, 8, None, np.ones((8, 1370, 1370), bool), None) == 8
    assert ways.images_together(large, 8, None, None, lambda logits: logits[:, 0]) == 8
    assert ways.images_together(lambda *_: None, 8, None, None, None) == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ways.images_together(model, 32, None, None, None) == 32


def test_memory_does_not_grow_with_the_batch(monkeypatch):
    sizes = dict(image_size=64, patch_size=8, width=64, depth=3, heads=2, mlp_dim=256)
    model = vi.create_model("vit_ti16", num_classes=3, **sizes)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]

    def temporary(images, name):
        def run(params, images):
            return vi.measure(model, params, images, (name,))[name]

        shape = jax.ShapeDtypeStruct((images, 64, 64, 3), jnp.float32)
        return jax.jit(run).lower(params, shape).compile().memory_analysis().temp_size_in_bytes

    whole = {name: temporary(16, name) for name in ("attention", "gradient")}
    so_many(monkeypatch, model, 4)
    for name, most in whole.items():
        assert temporary(16, name) < 0.5 * most
        assert temporary(64, name) < 0.7 * most
