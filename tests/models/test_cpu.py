"""Derivatives of the residual stream are made once, and are what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from vit_interact.models import cpu
from vit_interact.models.cpu import computed_once


def test_it_is_the_identity():
    x = jnp.asarray([1.0, -2.0, jnp.inf, jnp.nan, jnp.finfo(jnp.float32).max, 0.0])
    np.testing.assert_array_equal(computed_once(x), x)
    f = lambda x: jnp.sin(computed_once(x)).sum()  # noqa: E731
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.grad(f)(x), jnp.cos(x))
    np.testing.assert_array_equal(jax.vmap(jax.grad(f))(x), jnp.cos(x))
    np.testing.assert_array_equal(jax.jvp(f, (x,), (x,))[1], jnp.sum(jnp.cos(x) * x))
    np.testing.assert_allclose(jax.hessian(f)(x[0]), jnp.diag(-jnp.sin(x[0])))
    half = jnp.ones(3, jnp.bfloat16)
    assert jax.grad(lambda x: computed_once(x).sum())(half).dtype == jnp.bfloat16


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
def test_each_layer_reads_as_much_as_the_one_before():
    """Were sums over later layers repeated, bytes would grow with the square of the depth."""

    def read(depth):
        model = vi.create_model("vit_ti16", num_classes=5, image_size=32, depth=depth)
        images = jnp.zeros((2, 32, 32, 3))
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        loss = lambda params, images: model.apply(params, images).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=1)).lower(params, images).compile()
        return program.cost_analysis()["bytes accessed"]

    few, some, many = (read(depth) for depth in (2, 4, 6))
    assert many - some == pytest.approx(some - few, rel=0.005)


def test_other_devices_need_none_of_it(monkeypatch):
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    text = str(jax.make_jaxpr(jax.grad(lambda x: computed_once(x).sum()))(jnp.ones(3)))
    assert "div" not in text
