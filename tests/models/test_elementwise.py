"""GELU and LayerNorm are JAX's and Flax's, in value and derivative, with less kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.layers import close
from vit_interact.models import elementwise
from vit_interact.models.config import ACTIVATIONS
from vit_interact.models.elementwise import ACTIVATION_FUNCTIONS, LayerNorm, standardise


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("gelu", lambda x: nn.gelu(x, approximate=False)),
        ("gelu_tanh", nn.gelu),
        ("gelu_quick", lambda x: x * nn.sigmoid(1.702 * x)),
        ("silu", nn.silu),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_activations(name, plain):
    ours = ACTIVATION_FUNCTIONS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40)) * 3, jnp.float32)

    def made(f, x):
        squared = jax.grad(lambda x: jnp.sum(f(x) ** 2))
        curved = jax.grad(lambda x: jnp.sum(squared(x) ** 2))
        along = jax.jvp(f, (x,), (jnp.cos(x),))[1]
        return f(x), along, squared(x), jax.vmap(squared)(x), curved(x)

    both = [jax.jit(made, static_argnums=0)(f, x) for f in (ours, plain)]
    for one, other in zip(*both, strict=True):
        close(one, other, 1e-4)
    far = jnp.asarray([-1e4, -40.0, 0.0, 40.0, 1e4])
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(far), [0, 0, 0.5, 1, 1], atol=1e-6)
    half = x.astype(jnp.bfloat16)
    slope = jax.grad(lambda x: jnp.sum(ours(x).astype(jnp.float32)))(half)
    assert ours(half).dtype == slope.dtype == jnp.bfloat16
    close(slope, jax.grad(lambda x: jnp.sum(plain(x)))(x), 3e-2)


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 5, 16), (5, 16)])
def test_layer_norm(shape):
    """With a mean far from 0, as in DINOv2: the variance must not be a difference of squares."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) + 100, jnp.float32)
    theirs = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
    ours = LayerNorm(1e-5)
    params = theirs.init(jax.random.key(0), x)
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(params)
    params = jax.tree.map(lambda a: a + jnp.cos(jnp.arange(16.0)), params)

    def made(layer, params, x):
        loss = lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x)))  # noqa: E731
        slopes = jax.grad(loss, argnums=(0, 1))
        curved = jax.grad(lambda x: jnp.sum(slopes(params, x)[1] ** 2))(x)
        along = jax.jvp(lambda x: layer.apply(params, x), (x,), (jnp.cos(x),))[1]
        return layer.apply(params, x), slopes(params, x), curved, along

    both = [jax.jit(made, static_argnums=0)(layer, params, x) for layer in (ours, theirs)]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):
        assert one.shape == other.shape
        close(one, other, 1e-4)
    half = LayerNorm(1e-5, jnp.bfloat16).apply(params, x.astype(jnp.bfloat16))
    wanted = nn.LayerNorm(1e-5, jnp.bfloat16, use_fast_variance=False)
    assert half.dtype == jnp.bfloat16
    close(half, wanted.apply(params, x.astype(jnp.bfloat16)), 1e-2)


def test_standardised_tokens_by_numpy():
    x = np.random.default_rng(0).normal(size=(4, 8))
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.1)
    np.testing.assert_allclose(standardise(jnp.asarray(x), 0.1), expected, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_less_is_kept_for_the_backward_pass(activation, monkeypatch):
    """Of a layer, `erf` or the like, as wide as the MLP, and tokens without their mean are gone."""
    model = vi.create_model(
        "vit_ti16", num_classes=5, image_size=64, depth=3, activation=activation
    )
    images = jnp.zeros((8, 64, 64, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)

    def kept():
        loss = lambda params, images: model.apply(params, images).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=1)).lower(params, images).compile()
        return program.memory_analysis().temp_size_in_bytes

    ours = kept()
    # As jax derives them.
    monkeypatch.setitem(
        ACTIVATION_FUNCTIONS, activation, ACTIVATION_FUNCTIONS[activation].__wrapped__.fun
    )
    monkeypatch.setattr(elementwise, "standardise", elementwise._standardise.fun)
    assert ours < 0.85 * kept()
