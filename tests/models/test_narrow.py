"""Products of 16-bit arrays for matrix units, on hosts with and without these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import applied, tiny
from tests.models.layers import close
from vit_interact.models import cpu, narrow

HAS_UNITS = narrow._has_units()
NARROW = jnp.bfloat16


@pytest.fixture(params=[False, True], ids=["written_out", "for_units"])
def units(request, monkeypatch):
    monkeypatch.setattr(narrow, "_has_units", lambda: request.param)
    return request.param


def sides(rows=37, depth=24, width=40):
    generator = np.random.default_rng(0)
    shapes = ((rows, depth), (depth, width), (rows, width))
    return tuple(jnp.asarray(generator.normal(size=shape), NARROW) for shape in shapes)


def test_product_and_derivatives_are_those_of_wider_numbers(units):
    x, kernel, grad = sides()
    found, back = jax.vjp(jax.jit(narrow.product), x, kernel)
    wide = [side.astype(jnp.float32) for side in (x, kernel, grad)]
    expected, wide_back = jax.vjp(jnp.matmul, *wide[:2])
    made = zip((found, *back(grad)), (expected, *wide_back(wide[2])), strict=True)
    for narrow_one, wide_one in made:
        assert narrow_one.dtype == NARROW
        close(narrow_one, wide_one, 2.0**-8)


def test_contract_rounds_once(units):
    x, kernel, _ = sides()
    found = narrow.contract("md,de->me", x, kernel)
    wide = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_array_equal(found, wide.astype(NARROW))


def test_float32_is_as_ever(monkeypatch):
    monkeypatch.setattr(narrow, "_has_units", lambda: True)
    x, kernel, _ = (side.astype(jnp.float32) for side in sides())
    text = jax.jit(narrow.product).lower(x, kernel).as_text()
    assert "bf16" not in text and "custom" not in text
    np.testing.assert_array_equal(narrow.product(x, kernel), x @ kernel)
    jax.jvp(narrow.product, (x, kernel), (x, kernel))  # both modes of derivative


def test_many_at_once(units):
    x, kernel, _ = sides()
    many = jnp.stack([x, 2 * x])
    found = jax.vmap(narrow.product, (0, None))(many, kernel)
    np.testing.assert_array_equal(found[1], 2 * found[0])

    def total(x, kernel):
        return jnp.sum(narrow.product(x, kernel).astype(jnp.float32))

    by_kernel = jax.vmap(jax.grad(total, 1), (0, None))(many, kernel)
    close(by_kernel[1], 2 * by_kernel[0].astype(jnp.float32), 2.0**-8)


def test_a_model_and_its_maps_are_those_of_a_host_without_units(monkeypatch):
    model, params, images = tiny(dtype="bfloat16")
    names = ("attention", "leave_one_out", "gradient", "edge")

    def all_of_it():
        jax.clear_caches()
        return applied(model, params, images), vi.measure(model, params, images, names)

    monkeypatch.setattr(narrow, "_has_units", lambda: False)
    logits, maps = all_of_it()
    monkeypatch.setattr(narrow, "_has_units", lambda: True)
    found, found_maps = all_of_it()
    close(found, logits, 2e-2)
    for name in names:
        close(found_maps[name], maps[name], 5e-2)


@pytest.mark.skipif(not (HAS_UNITS and cpu._known_here()), reason="needs AMX and YNNPACK")
def test_products_are_left_to_the_units():
    """Of a layer, forward and backward; YNNPACK takes them in as they are, in 16 bits."""
    x, kernel, grad = sides(rows=64, depth=64, width=64)

    def both(x, kernel, grad):
        found, back = jax.vjp(narrow.product, x, kernel)
        return found, back(grad)[0]

    text = jax.jit(both).lower(x, kernel, grad).compile().as_text()
    products = [block for block in text.split("\n\n") if " dot(" in block]
    assert len(products) == 2
    for block in products:
        assert block.count("bf16[64,64]{1,0} parameter") == 2, block
