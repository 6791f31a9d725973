"""Attention of some images at a time against attention of all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import layers
from tests.models.layers import close
from vit_interact.models import attend
from vit_interact.models.attend import (
    QueryBlocks,
    attend_in_blocks,
    blocks_over_heads,
    explicit_attention,
    suitable_blocks,
)
from vit_interact.models.attend_backward import attention_gradients, gradients_in_blocks
from vit_interact.models.blocks import map_images
from vit_interact.observe.maps import Maps

N, H, K = 13, 4, 5
FORWARD, BACKWARD = Maps(("attention", "leave_one_out")), Maps(("edge",))

layer = functools.partial(layers.layer, (N, H, K), 3)


@pytest.mark.parametrize("batch", [(5,), (2, 3)])
@pytest.mark.parametrize("kind", [None, "all", "of images"])
@pytest.mark.parametrize("blocks", [QueryBlocks(99, images=2), QueryBlocks(5, None, 2, 1)])
def test_both_passes_are_those_of_all_images(batch, kind, blocks):
    q, k, v, kernel, g = layer(batch)
    shape = {None: (), "all": (N, N), "of images": (*batch, 1, N, N)}[kind]
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.7) if kind else None
    inputs = (q, k, v, None, mask, kernel)

    @jax.jit
    def apart():
        output, found = attend_in_blocks(inputs, blocks, FORWARD)
        return output, found, *gradients_in_blocks(inputs, blocks, BACKWARD, output, g)

    whole = explicit_attention(*inputs)
    sides, made = attention_gradients(whole, whole.output, g)
    expected = whole.output, FORWARD(whole), sides, BACKWARD(whole._replace(backward=made), g)
    jax.tree.map(close, apart(), expected)


def test_derivatives():
    q, k, v, kernel, _ = layer((3,))

    def loss(blocks, *sides):
        output, found = attend_in_blocks((*sides[:3], None, None, sides[3]), blocks, FORWARD)
        return jnp.sum(output**2) + sum(jnp.sum(jnp.sin(one)) for one in found.values())

    grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
    one, all_at_once = (grads(QueryBlocks(99, None, n, 1), q, k, v, kernel) for n in (2, None))
    jax.tree.map(close, one, all_at_once)


def test_images_do_not_mix():
    """Some are worked on twice where they do not divide evenly; none reaches another."""
    sizes = []

    def double(x, nothing):
        assert nothing is None
        sizes.append(len(x))
        return {"twice": 2 * x, "sum": x.sum((1, 2, 3))}

    x = jnp.arange(5.0 * 2 * 1 * 3).reshape(5, 2, 1, 3).at[1].set(jnp.nan)
    found = jax.jit(lambda x: map_images(double, 2, x, None))(x)
    assert set(sizes) == {2}
    np.testing.assert_array_equal(found["twice"], 2 * x)
    np.testing.assert_array_equal(found["sum"], x.sum((1, 2, 3)))


def test_when_and_how_many(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert suitable_blocks(8, 6, 197, 197) is None
    assert suitable_blocks(8, 6, 577, 577) == QueryBlocks(577, images=1)
    assert suitable_blocks(8, 6, 1370, 1370) == QueryBlocks(510, images=1)
    assert blocks_over_heads(8, 6, 1370, 1370) == QueryBlocks(1370, None, 1, 1)
    assert blocks_over_heads(8, 12, 197, 197) == QueryBlocks(197, None, 3)  # short ones together
    with pytest.raises(ValueError, match="one query, head and image"):
        QueryBlocks(5, images=0)

    # Sharded images would have to leave their devices.
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert suitable_blocks(8, 6, 1370, 1370) == QueryBlocks(attend.SMALLEST_BLOCK)


def test_only_some_images_have_weights_at_a_time():
    q, k, v, kernel, _ = layers.layer((64, 4, 8), 0, (16,))

    def temporary(blocks):
        run = jax.jit(lambda *x: attend_in_blocks((*x, None, None, kernel), blocks, FORWARD))
        return run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    weights = 4 * 16 * 4 * 64 * 64
    assert temporary(QueryBlocks(64)) > weights
    assert temporary(QueryBlocks(64, images=2)) < weights / 2
