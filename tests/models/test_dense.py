"""Dense layers are Flax's, in parameters, value, derivative and shape, by flat products."""

import functools

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_interact.models.dense import Dense, PatchEmbedding
from vit_interact.models.parameter import parameter


@pytest.mark.parametrize(
    ("shape", "features", "axes"),
    [
        pytest.param((2, 3, 4), 5, 1, id="wider"),
        pytest.param((2, 3, 4), 2, 1, id="narrower"),
        pytest.param((2, 3, 4), (2, 3), 1, id="to heads"),
        pytest.param((2, 3, 2, 3), 5, 2, id="from heads"),
        pytest.param((4,), 5, 1, id="one token"),
    ],
)
def test_equals_flax(shape, features, axes):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    theirs = nn.DenseGeneral(features, axis=tuple(range(-axes, 0)))
    ours = Dense(features, axes)

    def run(layer):
        params = layer.init(jax.random.key(3), x)
        loss = lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x)))  # noqa: E731
        return params, layer.apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

    expected, found = run(theirs), run(ours)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_without_bias_and_in_bfloat16():
    layer = Dense(5, use_bias=False, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), jnp.ones((2, 3, 4)))
    assert list(params["params"]) == ["kernel"]
    assert layer.apply(params, jnp.ones((2, 3, 4))).dtype == jnp.bfloat16


def test_tokens_are_one_axis_and_heads_another():
    layer = Dense((2, 3))
    params = layer.init(jax.random.key(0), jnp.ones((2, 3, 4)))
    jaxpr = jax.make_jaxpr(layer.apply)(params, jnp.ones((2, 3, 4)))
    (program,) = (e.params["jaxpr"] for e in jaxpr.eqns if "jaxpr" in e.params)
    (product,) = (e for e in program.eqns if e.primitive.name == "dot_general")
    assert [v.aval.shape for v in product.invars] == [(6, 4), (4, 6)]


@pytest.mark.parametrize(
    "size", [(12, 18), (14, 20)]
)  # whole patches; and a border that is cut off
def test_patches_are_those_of_a_convolution(size):
    ours = PatchEmbedding(5, (4, 6))
    theirs = nn.Conv(5, (4, 6), strides=(4, 6), padding="VALID")
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    params = theirs.init(jax.random.key(1), images)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), images), params)

    def loss(module, params, images):
        tokens = module.apply(params, images)
        return jnp.sum(jnp.sin(tokens)), tokens

    found, expected = (
        jax.value_and_grad(functools.partial(loss, module), (0, 1), has_aux=True)(params, images)
        for module in (ours, theirs)
    )
    assert found[0][1].shape == (2, 3, 3, 5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_parameters_are_compared_and_not_traced():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self):
            return parameter(self, "kernel", init, (2, 3))

    calls = []

    def init(key, shape):
        calls.append(shape)
        return nn.Partitioned(jnp.ones(shape), names=("in", "out"))

    variables = Layer().init(jax.random.key(0))
    made = len(calls)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    assert Layer().apply(variables).shape == (2, 3) and len(calls) == made
    shapes = r"\(2, 3\).*\(3, 2\)"  # flax 0.10.7 names the parameter after them
    message = rf'"kernel".*{shapes}|{shapes}.*"kernel"'
    with pytest.raises(flax.errors.ScopeParamShapeError, match=message):
        Layer().apply({"params": {"kernel": jnp.ones((3, 2))}})
