"""Attention of a few heads at a time against attention all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import layers
from tests.models.helpers import tiny
from tests.models.layers import close
from vit_interact import interactions as vx
from vit_interact.interactions.head_terms import TERMS
from vit_interact.layout import TokenLayout
from vit_interact.models import attend
from vit_interact.models.attend import (
    QueryBlocks,
    attend_in_blocks,
    blocks_over_heads,
    explicit_attention,
)
from vit_interact.models.attend_backward import attention_gradients, gradients_in_blocks
from vit_interact.models.bias import SeparableBias
from vit_interact.observe.maps import Maps, needs_backward
from vit_interact.observe.ways import query_blocks

LAYOUT = TokenLayout(3, 4, 2)
N, H, K = LAYOUT.num_tokens, 4, 5
BACKWARD = tuple(name for name in TERMS if needs_backward(name))
FORWARD = tuple(name for name in TERMS if name not in BACKWARD)


layer = functools.partial(layers.layer, (N, H, K), 3)


def make_mask(kind):
    if kind is None:
        return None
    shape = {"all": (N, N), "of heads": (2, H, N, N), "of images": (2, 1, N, N)}[kind]
    # Row 3 attends to nothing.
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.7).at[..., 3, :].set(False)


@pytest.mark.parametrize("batch", [(), (1,), (2,), (2, 3)])
@pytest.mark.parametrize("blocks", [QueryBlocks(99, None, 1), QueryBlocks(5, None, 2)])
def test_maps_are_those_of_all_heads(batch, blocks):
    q, k, v, kernel, g = layer(batch)

    @jax.jit
    def whole(q, k, v, g):
        attended = explicit_attention(q, k, v, None, None, kernel)
        assert attended.weights.shape == (*batch, H, N, N)
        made = attention_gradients(attended, attended.output, g)
        graded = {"edge": vx.edge, "gradient": vx.gradient}
        found = {n: f(attended.weights, v, g) for n, f in graded.items()}
        return attended.output, Maps(FORWARD)(attended), made[0][:3], found

    @jax.jit
    def over_heads(q, k, v, g):
        inputs = (q, k, v, None, None, kernel)
        output, found = attend_in_blocks(inputs, blocks, Maps(FORWARD))
        sides, graded = gradients_in_blocks(inputs, blocks, Maps(BACKWARD), output, g)
        return output, found, sides[:3], graded

    found, expected = over_heads(q, k, v, g), whole(q, k, v, g)
    assert np.max(explicit_attention(q, k, v).weights) > 0.9
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        close(one, other)


@pytest.mark.parametrize("kind", ["all", "of heads", "of images"])
@pytest.mark.parametrize("blocks", [QueryBlocks(5, None, 1), QueryBlocks(6, LAYOUT, 2)])
def test_masks(kind, blocks):
    q, k, v, kernel, g = layer()
    mask = make_mask(kind)
    inputs = (q, k, v, None, mask, kernel)
    whole = explicit_attention(*inputs)
    output, found = jax.jit(lambda: attend_in_blocks(inputs, blocks, Maps(FORWARD)))()
    close(output, whole.output)
    for name, expected in Maps(FORWARD)(whole).items():
        close(found[name], expected)
    expected = attention_gradients(whole, whole.output, g)[0][:3]
    sides, _ = jax.jit(lambda: gradients_in_blocks(inputs, blocks, Maps(BACKWARD), output, g))()
    for one, other in zip(sides[:3], expected, strict=True):
        close(one, other)


def test_a_narrow_layer():
    """Its output stays as wide as the weights until the maps are made."""
    q, k, v, kernel, _ = layer(dtype=jnp.bfloat16)
    inputs, blocks = (q, k, v, None, None, kernel), QueryBlocks(99, None, 2)
    output, found = jax.jit(lambda: attend_in_blocks(inputs, blocks, Maps(FORWARD)))()
    assert output.dtype == jnp.bfloat16
    for name, expected in Maps(FORWARD)(explicit_attention(*inputs)).items():
        assert found[name].dtype == jnp.float32
        close(found[name], expected, 1e-2)


def test_derivatives():
    q, k, v, kernel, _ = layer()

    def loss(blocks, *sides):
        inputs = (*sides[:3], None, None, sides[3])
        if blocks is None:
            attended = explicit_attention(*inputs)
            output, found = attended.output, Maps(FORWARD)(attended)
        else:
            output, found = attend_in_blocks(inputs, blocks, Maps(FORWARD))
        return jnp.sum(output**2) + sum(jnp.sum(jnp.sin(one)) for one in found.values())

    grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
    expected = grads(None, q, k, v, kernel)
    for blocks in (QueryBlocks(99, None, 1), QueryBlocks(5, None, 2)):
        for one, other in zip(grads(blocks, q, k, v, kernel), expected, strict=True):
            close(one, other)


def test_an_image_that_is_not_a_number_spoils_no_other():
    q, k, v, kernel, _ = layer()
    inputs = (q.at[0].set(jnp.nan), k, v, None, None, kernel)
    blocks = QueryBlocks(99, None, 1)
    found = attend_in_blocks(inputs, blocks, Maps(("leave_one_out",)))[1]["leave_one_out"]
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_without_a_sum_over_heads_all_are_taken_at_once():
    q, k, v, kernel, _ = layer()
    bias = SeparableBias(jnp.ones((2, 1, 12, 3)), jnp.zeros((2, 1, 12, 4)))
    blocks, whole = QueryBlocks(5, None, 1), QueryBlocks(5)
    for given, reduce in ((None, Maps(FORWARD).__call__), (bias, Maps(FORWARD))):
        inputs = (q, k, v, given, None, kernel)
        found, expected = (attend_in_blocks(inputs, one, reduce)[1] for one in (blocks, whole))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_how_many_heads(monkeypatch):
    assert blocks_over_heads(1, 6, 197, 197) == QueryBlocks(197, None, 3)  # half of them
    assert blocks_over_heads(8, 12, 197, 197) == QueryBlocks(197, None, 3)  # 4 MiB
    assert blocks_over_heads(32, 12, 197, 197) == QueryBlocks(197, None, 1)
    assert blocks_over_heads(1, 6, 1370, 1370) == QueryBlocks(1370, None, 1)
    assert blocks_over_heads(1, 6, 1370, 1370, maps=False) == QueryBlocks(1370, None, 2)  # 16 MiB
    assert blocks_over_heads(1, 6, 4097, 4097) == QueryBlocks(1023, None, 1)
    assert blocks_over_heads(1, 1, 50, 50) == QueryBlocks(50, None, 1)
    with pytest.raises(ValueError, match="one query, head"):
        QueryBlocks(5, heads=0)

    model, _, _ = tiny()

    def chosen(*names, block=None, images=1):
        return query_blocks(model, images, None, block, names)

    assert chosen("attention") is None and chosen("leave_one_out", "value_norm") is None
    assert chosen("leave_one_out", images=2) is None  # of several
    # Of very many: all heads' weights would take 41 MB.
    assert chosen("leave_one_out", images=20_000) == QueryBlocks(13, None, 1)
    assert chosen("attention", images=20_000) is None
    assert chosen("leave_one_out", "edge") == QueryBlocks(13, None, 1)
    assert chosen("leave_one_out", block=5) == QueryBlocks(5, None, 1)
    assert chosen("dispersion", block=5) == QueryBlocks(5)
    monkeypatch.setattr("vit_interact.observe.ways._MANY_TOKENS", 13)
    assert chosen("attention") == QueryBlocks(13, None, 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen("attention") is None


def test_weights_of_one_head_are_held():
    """1,025 tokens, 6 heads: three arrays of one head, and less than the weights of all."""
    tokens, heads, width = 1025, 6, 64
    shape, kernel = (1, tokens, heads, width), (heads, width, heads * width)
    one_map = 4 * tokens**2

    def held(names, gradients):
        def run(q, k, v, w, o, g):
            inputs, blocks = (q, k, v, None, None, w), QueryBlocks(tokens, None, 1)
            if gradients:
                return gradients_in_blocks(inputs, blocks, Maps(names), o, g)
            return attend_in_blocks(inputs, blocks, Maps(names))

        shapes = (shape, shape, shape, kernel, shape, shape)
        arguments = [jax.ShapeDtypeStruct(one, jnp.float32) for one in shapes]
        text = jax.jit(run).lower(*arguments)
        assert f"{heads}x{tokens}x{tokens}x" not in text.as_text()
        return text.compile().memory_analysis().temp_size_in_bytes

    assert held(("attention",), False) < 2.5 * one_map
    assert held(("leave_one_out",), False) < 4 * one_map
    assert held(("gradient",), True) < 5 * one_map
    assert one_map > attend.HEAD_BYTES
