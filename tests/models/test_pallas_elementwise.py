"""LayerNorm's and GELU's kernels, interpreted, are what XLA makes without them."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import lowered
from tests.models.layers import close
from vit_interact import models
from vit_interact.models import dense, fused, gpu, pallas_elementwise
from vit_interact.models.config import ViTConfig
from vit_interact.models.elementwise import LayerNorm, standardise
from vit_interact.models.half_erf import half_erf
from vit_interact.models.pallas_elementwise import gelu_of_sum, norm_and_tokens
from vit_interact.models.vit import ViT

SHAPES = [(3, 37, 48), (2, 9, 96), (5, 384), (1, 7, 1536)]
EPSILON = 1e-5


def arrays(shape, dtype=jnp.float32):
    """Tokens with a mean far from 0, two gradients, and two rows."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, g, h = (jax.random.normal(key, shape) for key in keys[:3])
    rows = [jax.random.normal(key, shape[-1:]) for key in keys[3:]]
    return (3 * x + 50).astype(dtype), g.astype(dtype), h.astype(dtype), *rows


@pytest.fixture(params=[3, 1000])
def programs(request, shape, monkeypatch):
    """Several tiles a program, the last of which start early; and one."""
    monkeypatch.setattr(pallas_elementwise, "_PROGRAMS", request.param)
    monkeypatch.setattr(pallas_elementwise, "_AT_ONCE", 4 * shape[-1])
    jax.clear_caches()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("programs")
def test_layer_norm(shape):
    x, g, h, scale, bias = arrays(shape)
    plain = lambda x, scale, bias: (standardise(x, EPSILON) * scale + bias, x)  # noqa: E731
    ours = functools.partial(norm_and_tokens, epsilon=EPSILON, interpret=True)
    found, expected = (jax.vjp(f, x, scale, bias) for f in (lambda *a: ours(*a), plain))
    for one, other in zip(found[0], expected[0], strict=True):
        close(one, other)
    for one, other in zip(found[1]((g, h)), expected[1]((g, h)), strict=True):
        close(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("programs")
def test_gelu(shape):
    x, g, _, _, bias = arrays(shape)
    x = x - 50
    plain = lambda x, bias: nn.gelu(x + bias, approximate=False)  # noqa: E731
    found, expected = (
        jax.vjp(f, x, bias) for f in (lambda *a: gelu_of_sum(*a, interpret=True), plain)
    )
    close(found[0], expected[0], 1e-4)
    for one, other in zip(found[1](g), expected[1](g), strict=True):
        close(one, other, 1e-3)


def test_16_bit_in_and_out():
    x, g, h, scale, bias = arrays((4, 9, 48), jnp.bfloat16)
    found, pull = jax.vjp(lambda *a: norm_and_tokens(*a, EPSILON, interpret=True), x, scale, bias)
    slopes = pull((g, h))
    assert [one.dtype for one in (*found, *slopes)] == [jnp.bfloat16] * 3 + [jnp.float32] * 2
    wide = jnp.float32(x)
    close(found[0], standardise(wide, EPSILON) * scale + bias, 1e-2)
    found, pull = jax.vjp(lambda *a: gelu_of_sum(*a, interpret=True), x - 50, bias)
    assert found.dtype == pull(g)[0].dtype == jnp.bfloat16
    close(found, nn.gelu(wide - 50 + bias, approximate=False), 1e-2)


def test_erf_of_16_bit_numbers():
    """All that there are: GELU is good to 2.1e-4, as its derivative."""
    every = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    every = every[np.isfinite(every.astype(np.float32))]
    wide = jnp.float32(every)
    erf = half_erf(jnp.asarray(every))
    near = jnp.clip(wide, -100, 100)
    assert jnp.abs(near * (erf - half_erf(wide)))[jnp.abs(wide) < 20].max() < 2.2e-4
    assert jnp.abs(erf - half_erf(wide)).max() < 6.5e-5
    np.testing.assert_allclose(
        erf[jnp.abs(wide) > 4], 0.5 * np.sign(wide[jnp.abs(wide) > 4]), atol=3e-6
    )


def model_and_arrays(**settings):
    model = ViT(ViTConfig((40, 48), (8, 8), width=48, depth=3, heads=3, num_classes=5, **settings))
    images = jax.random.normal(jax.random.key(1), (2, 40, 48, 3))
    return model, model.init(jax.random.key(0), images)["params"], images


def learned(model, params, images):
    """Logits and derivatives by parameters and images."""
    jax.clear_caches()

    def score(params, images):
        logits = model.apply({"params": params}, images, train=True)
        return jnp.sum(jnp.sin(logits)), logits

    slopes, logits = jax.jit(jax.grad(score, argnums=(0, 1), has_aux=True))(params, images)
    return jax.tree.leaves((logits, slopes))


def alike(found, expected, tolerance):
    """But for derivatives by keys' biases, which are 0 but for what is rounded."""
    for one, other in zip(found, expected, strict=True):
        if np.abs(other).max() > 1e-6:
            close(one, other, tolerance)


def test_a_model_learns_the_same_by_kernels(monkeypatch):
    model, params, images = model_and_arrays()
    expected = learned(model, params, images)
    interpreted = types.SimpleNamespace(
        norm_and_tokens=lambda *a: norm_and_tokens(*a, True),
        gelu_of_sum=lambda *a: gelu_of_sum(*a, True),
    )
    monkeypatch.setattr(gpu, "kernels_pay", lambda *_: True)
    monkeypatch.setattr(models, "pallas_elementwise", interpreted)
    alike(learned(model, params, images), expected, 2e-3)


@pytest.mark.parametrize("scan,pool", [(False, "cls"), (True, "gap")])
def test_one_token_more_changes_nothing(scan, pool, monkeypatch):
    """cuDNN's derivative wants an even number of tokens; here XLA attends in its place."""
    model, params, images = model_and_arrays(scan=scan, pool=pool, remat=scan)
    assert model.config.layout.num_tokens % 2
    expected = learned(model, params, images)
    seen = []

    def attend(query, key, value, **lengths):
        seen.append(query.shape[1])
        return jax.nn.dot_product_attention(query, key, value, scale=1.0, **lengths)

    monkeypatch.setattr(fused, "cudnn_knows", lambda *_: True)
    monkeypatch.setattr(fused, "_cudnn", attend)
    found = learned(model, params, images)
    assert set(seen) == {model.config.layout.num_tokens + 1}
    alike(found, expected, 1e-4)


def test_queries_are_scaled_by_their_kernel_where_there_is_no_cpu(monkeypatch):
    model, params, images = model_and_arrays()
    expected = learned(model, params, images)
    monkeypatch.setattr(dense, "on_cpu", lambda: False)
    alike(learned(model, params, images), expected, 1e-5)


def test_where_the_kernels_pay(monkeypatch):
    pays = gpu.kernels_pay
    many = jax.ShapeDtypeStruct((16, 197, 384), jnp.bfloat16)
    assert not pays(many, jnp.bfloat16)  # no GPU
    monkeypatch.setattr(fused, "cudnn_knows", lambda *_: True)
    assert not pays(many, jnp.bfloat16)  # several devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert pays(many, jnp.bfloat16)
    assert not pays(many, jnp.float32)
    assert not pays(jax.ShapeDtypeStruct((1, 197, 384), jnp.bfloat16), jnp.bfloat16)
    assert not pays(jax.ShapeDtypeStruct((16, 197, 16 * 25), jnp.bfloat16), jnp.bfloat16)


def test_lowered_for_a_gpu():
    x, g, _, scale, bias = arrays((8, 197, 384), jnp.bfloat16)

    def run(x, g, scale, bias):
        norm, pull = jax.vjp(lambda *a: norm_and_tokens(*a, EPSILON), x, scale, bias)
        gelu, pull_gelu = jax.vjp(gelu_of_sum, x, bias)
        return norm, pull((g, g)), gelu, pull_gelu(g)

    text = lowered(run, "cuda", x, g, scale, bias)
    for name in ("norm", "norm_backward", "gelu", "gelu_backward"):
        assert f"vit_interact_{name}" in text


def test_layer_norm_gives_the_tokens_too():
    x, *_ = arrays((2, 5, 16))
    layer = LayerNorm(EPSILON)
    params = layer.init(jax.random.key(0), x)
    normal, same = layer.apply(params, x, keep=True)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(normal, layer.apply(params, x))
