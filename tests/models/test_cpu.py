"""What XLA's CPU compiler is told: derivatives made once, and whose products it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.layers import close
from vit_interact.models import cpu
from vit_interact.models.cpu import compiler_options, computed_once, jit


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


@pytest.mark.slow
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


@pytest.fixture
def many_rows(monkeypatch):
    """A small model and three images of 5 tokens, which are many here."""
    monkeypatch.setattr(cpu, "_MANY_ROWS", 15)
    monkeypatch.setattr(cpu, "_LONG", 20)
    model = vi.create_model("vit_ti16", num_classes=5, image_size=32, depth=1)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 32, 3)), jnp.float32)
    return model, model.init(jax.random.key(0), images[:1])["params"], images


def test_products_are_chosen_by_tokens_and_type(many_rows, monkeypatch):
    model, *_ = many_rows
    monkeypatch.setattr(cpu, "on_cpu", lambda: True)
    monkeypatch.setattr(cpu, "_known_here", lambda: True)
    assert compiler_options(model, 3) and not compiler_options(model, 2)
    assert compiler_options(model, 4, seldom=True) == compiler_options(model, 3)
    assert compiler_options(model, 3, seldom=True) not in ({}, compiler_options(model, 3))
    assert compiler_options(model, 2, seldom=True) == compiler_options(model, 3, seldom=True)
    half = dataclasses.replace(model.config, dtype="bfloat16")
    assert not compiler_options(model.clone(config=half), 3)
    assert not compiler_options(model.apply, 3)
    monkeypatch.setattr(cpu, "_MANY_ROWS", 512)
    assert compiler_options(vi.create_model("vit_s14", image_size=518), 1)  # 1,370 tokens
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    assert not compiler_options(model, 3)


@pytest.mark.slow
@pytest.mark.skipif(not cpu._known_here(), reason="this jaxlib does not know the option")
def test_measure_is_the_same_with_other_products(many_rows, monkeypatch):
    """And it can be traced and differentiated, which jax forbids programs that have options."""
    model, params, images = many_rows
    assert compiler_options(model, 3)

    def maps(images):
        return vi.measure(model, params, images, ("edge", "attention"))

    own = maps(images)
    within = [jax.jit(maps)(images), jax.jit(lambda: maps(images))()]
    within.append(jax.tree.map(lambda x: x[0], jax.lax.map(maps, images[None])))
    within.append(jax.tree.map(lambda x: x[0], jax.vmap(maps)(images[None])))
    for found in within:
        jax.tree.map(close, found, own)
    spread = lambda images: maps(images)["attention"].var()  # noqa: E731
    by_own = jax.grad(spread)(images)
    monkeypatch.setattr(cpu, "compiler_options", lambda *_, **__: {})
    jax.tree.map(close, maps(images), own)
    close(by_own, jax.grad(spread)(images))


@pytest.mark.skipif(not cpu._known_here(), reason="this jaxlib does not know the option")
def test_each_size_is_compiled_once(many_rows):
    model, traced = many_rows[0], []

    def double(x):
        traced.append(x.shape)
        return 2 * x

    program = jit(lambda x: (model, len(x)))(double)
    for count in (3, 3, 2, 2, 3):
        np.testing.assert_array_equal(program(jnp.ones(count)), 2 * np.ones(count))
    assert traced == [(3,), (2,)]
