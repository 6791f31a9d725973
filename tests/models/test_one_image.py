"""One image, whose axis is left away inside, gives what it gives in a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import applied, tiny
from vit_interact import interactions as vx
from vit_interact.models.attend import explicit_attention
from vit_interact.models.attend_backward import attention_gradients
from vit_interact.models.vit import ViT

H, N, K, D = 3, 5, 4, 6


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_derivatives(masked):
    query, key, value, g = (normal(2, N, H, K) + i for i in range(4))
    mask = jnp.tril(jnp.ones((N, N), bool)) if masked else None
    bias = normal(2, H, N, N) if masked else None

    @jax.jit
    def run(sides, g, bias):
        attended = explicit_attention(*sides, bias, mask)
        gradients, _ = attention_gradients(attended, attended.output, g, bias)
        loss = lambda *sides: jnp.sum(explicit_attention(*sides, bias, mask).output * g)  # noqa: E731
        derived = jax.grad(loss, (0, 1, 2))(*sides)
        return *attended[3:6], *gradients[:3], *derived

    both = (query, key, value), g, bias
    second = slice(1, 2)
    expected, found = run(*both), run(*jax.tree.map(lambda side: side[second], both))
    for one, of_two in zip(found, expected, strict=True):
        assert one.shape == (1, *of_two.shape[1:])
        np.testing.assert_allclose(one, of_two[second], rtol=1e-5, atol=1e-5)
    for own, derived in zip(found[3:6], found[6:], strict=True):
        np.testing.assert_allclose(own, derived, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["value_norm", "gradient", "leave_one_out", "edge"])
@pytest.mark.parametrize("axes", [(), (1,), (1, 1)])
def test_indicators(name, axes):
    weights = jax.nn.softmax(3 * normal(H, N, N))
    third = normal(N, H, K) + 1 if name in ("gradient", "edge") else normal(H, K, D)
    function = vx.INDICATORS[name]
    alone = function(weights, normal(N, H, K), third)
    sides = normal(N, H, K).reshape(*axes, N, H, K), third
    if name in ("gradient", "edge"):
        sides = sides[0], third.reshape(*axes, N, H, K)
    found = function(weights.reshape(*axes, H, N, N), *sides)
    assert found.shape == (*axes, N, N)
    np.testing.assert_allclose(found.reshape(N, N), alone, rtol=1e-5, atol=1e-6)
    pair = [jnp.stack([one, one]) for one in (weights, normal(N, H, K))]
    third = third if third.shape == (H, K, D) else jnp.stack([third, third])
    np.testing.assert_allclose(function(*pair, third)[1], alone, rtol=1e-5, atol=1e-6)


def test_model():
    model, params, images = tiny()
    assert isinstance(model, ViT)
    loss = lambda images: jnp.sum(jnp.sin(applied(model, params, images)))  # noqa: E731
    both = jax.grad(loss)(images)
    np.testing.assert_allclose(jax.grad(loss)(images[1:2]), both[1:2], rtol=1e-4, atol=1e-6)
