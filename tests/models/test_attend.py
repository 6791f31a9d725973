"""Attention in blocks of queries against attention all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import layers
from tests.models.layers import close
from vit_interact import interactions as vx
from vit_interact.interactions.indicators import edge_of_logits, gradient_of_logits
from vit_interact.layout import TokenLayout
from vit_interact.models import attend_backward, softmax
from vit_interact.models.attend import (
    QueryBlocks,
    attend_in_blocks,
    explicit_attention,
    suitable_blocks,
)
from vit_interact.models.attend_backward import attention_gradients, gradients_in_blocks
from vit_interact.models.bias import SeparableBias
from vit_interact.models.blocks import Summed
from vit_interact.models.fused import fused_attention
from vit_interact.models.softmax import HeadsJoined

LAYOUT = TokenLayout(3, 4, 2)
N, H, K = LAYOUT.num_tokens, 3, 5
FORWARD = ("attention", "dispersion", "value_norm", "leave_one_out")


layer = functools.partial(layers.layer, (N, H, K), 2)


def forward(attended):
    return {
        name: vx.INDICATORS[name](*(getattr(attended, need) for need in vx.NEEDS[name]))
        for name in FORWARD
    }


def backward(attended, g):
    arguments = attended.weights, attended.values, g
    return {"edge": vx.edge(*arguments), "gradient": vx.gradient(*arguments)}


def test_groups_hold_every_query_and_columns_stay_whole():
    assert [g.tolist() for g in QueryBlocks(5).groups(12)] == [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    ]
    assert QueryBlocks(5).groups(7)[0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    prefix, columns = QueryBlocks(6, LAYOUT).groups(N)
    assert prefix.tolist() == [[0, 1]]
    assert columns.tolist() == [[2, 6, 10, 3, 7, 11], [4, 8, 12, 5, 9, 13]]
    (only,) = QueryBlocks(1, TokenLayout(3, 2, 0)).groups(6)
    assert only.tolist() == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match="at least one query"):
        QueryBlocks(0)


@pytest.mark.parametrize(
    ("blocks", "restricted"),
    [
        (QueryBlocks(5), False),
        (QueryBlocks(99), False),
        (QueryBlocks(5), True),
        (QueryBlocks(6, LAYOUT), True),
    ],
)
def test_blocks_equal_all_at_once(blocks, restricted):
    q, k, v, kernel, g = layer()
    bias = mask = None
    if restricted:
        rng = np.random.default_rng(0)
        mask = jnp.asarray(rng.random((2, 1, N, N)) < 0.7).at[0, 0, 3].set(False)
        rows, cols = (rng.normal(size=(2, H, 12, n)).astype(np.float32) for n in (3, 4))
        bias = SeparableBias(jnp.asarray(rows), jnp.asarray(cols))

    # Arguments, not constants: folding these, jaxlib 0.7.0 gives another `edge`.
    @jax.jit
    def whole(q, k, v, g):
        full = None if bias is None else bias.full(N)
        attended = explicit_attention(q, k, v, full, mask, kernel)
        return attended.output, {**forward(attended), **backward(attended, g)}

    @jax.jit
    def in_blocks(q, k, v, g):
        inputs = (q, k, v, bias, mask, kernel)
        output, found = attend_in_blocks(inputs, blocks, forward)
        return output, {**found, **attend_in_blocks(inputs, blocks, backward, g)[1]}

    (output, found), (expected_output, expected) = in_blocks(q, k, v, g), whole(q, k, v, g)
    close(output, expected_output)
    assert set(found) == set(expected)
    for name in expected:
        close(found[name], expected[name])


def test_any_leading_axes_and_fewer_queries_than_keys():
    q, k, v, kernel, _ = layer(batch=(2, 3))
    inputs = (q[..., :4, :, :], k, v, None, None, kernel)
    reduce = lambda a: {"x": vx.dispersion(a.weights)}  # noqa: E731
    whole = explicit_attention(*inputs)
    output, found = jax.jit(lambda: attend_in_blocks(inputs, QueryBlocks(3), reduce))()
    assert found["x"].shape == (2, 3, 4, N)
    close(output, whole.output)
    close(found["x"], vx.dispersion(whole.weights))


def test_sums_are_over_all_queries_once():
    q, k, v, _, _ = layer()
    total = lambda a: {"sum": Summed(a.weights.sum(axis=(-3, -2)))}  # noqa: E731
    expected = explicit_attention(q, k, v).weights.sum(axis=(-3, -2))
    inputs = (q, k, v, None, None, None)
    for blocks in (QueryBlocks(7), QueryBlocks(3, LAYOUT)):
        close(attend_in_blocks(inputs, blocks, total)[1]["sum"], expected)
    with pytest.raises(ValueError, match="share queries"):
        attend_in_blocks(inputs, QueryBlocks(5), total)


def test_gradients_are_those_of_the_softmax():
    q, k, v, _, g = layer()
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((2, 1, N, N)) < 0.7).at[0, 0, 3].set(False)
    bias = jnp.asarray(rng.normal(size=(2, 1, N, N)).astype(np.float32))  # of all heads

    @jax.jit
    def both():
        attended = explicit_attention(q, k, v, bias, mask)
        attend = lambda *inputs: explicit_attention(*inputs, mask).output  # noqa: E731
        expected = jax.vjp(attend, q, k, v, bias)[1](g)
        return attention_gradients(attended, attended.output, g, bias)[0], expected

    for found, expected in zip(*both(), strict=True):
        close(found, expected)
    assert attention_gradients(explicit_attention(q, k, v), q, g)[0][3] is None


@pytest.mark.parametrize("kind", ["none", "array", "separable"])
@pytest.mark.parametrize("blocks", [QueryBlocks(5), QueryBlocks(6, LAYOUT)])
def test_derivative_of_a_layer_in_blocks_and_indicators_with_it(blocks, kind):
    """Queries that a block repeats count once; the bias has a derivative, too."""
    q, k, v, kernel, g = layer()
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((2, 1, N, N)) < 0.7).at[0, 0, 3].set(False)
    rows, cols = (jnp.asarray(rng.normal(size=(2, H, 12, n)), jnp.float32) for n in (3, 4))
    separable = SeparableBias(rows, cols)
    bias = {"none": None, "array": separable.full(N)[:, :1], "separable": separable}[kind]

    def reduce(attended, g):
        made = attended.backward
        assert made is not None
        return {
            "edge": edge_of_logits(attended.weights, made.logits),
            "gradient": gradient_of_logits(attended.weights, *made),
        }

    @jax.jit
    def whole():
        def attend(*inputs):
            bias = inputs[3].full(N) if kind == "separable" else inputs[3]
            return explicit_attention(*inputs[:3], bias, mask, kernel)

        pull = jax.vjp(lambda *inputs: attend(*inputs).output, q, k, v, bias)[1]
        return pull(g), backward(attend(q, k, v, bias), g)

    @jax.jit
    def in_blocks():
        inputs = (q, k, v, bias, mask, kernel)
        output = attend_in_blocks(inputs, blocks)[0]
        return gradients_in_blocks(inputs, blocks, reduce, output, g)

    (sides, found), (expected_sides, expected) = in_blocks(), whole()
    for one, other in zip(jax.tree.leaves(sides), jax.tree.leaves(expected_sides), strict=True):
        close(one, other)
    for name in expected:
        close(found[name], expected[name])


def test_derivatives_through_blocks():
    q, k, v, kernel, _ = layer()

    def loss(blocks, q, k, v, kernel):
        if blocks is None:
            attended = explicit_attention(q, k, v, None, None, kernel)
            output, found = attended.output, forward(attended)
        else:
            output, found = attend_in_blocks((q, k, v, None, None, kernel), blocks, forward)
        return jnp.sum(output**2) + sum(jnp.sum(jnp.sin(found[name])) for name in found)

    grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
    found, expected = grads(QueryBlocks(5), q, k, v, kernel), grads(None, q, k, v, kernel)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_output_is_that_of_jax(masked, monkeypatch):
    q, k, v, _, _ = layer()
    mask = jnp.asarray(np.random.default_rng(1).random((2, H, N, N)) < 0.6) if masked else None
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0)
    close(fused_attention(q, k, v, mask), expected)
    monkeypatch.setattr("vit_interact.models.attend.WEIGHT_BYTES", 4 * 2 * H * N * 5)
    monkeypatch.setattr("vit_interact.models.attend.SMALLEST_BLOCK", 1)
    assert suitable_blocks(2, H, N, N) == QueryBlocks(5)
    close(fused_attention(q, k, v, mask), expected)


def temporary(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_no_weights_of_a_whole_layer_are_held():
    """1,025 tokens, 6 heads: forward with an indicator, and backward with another."""
    tokens, heads, width = 1025, 6, 64
    weights = 4 * heads * tokens**2
    shape, kernel = (1, tokens, heads, width), (heads, width, heads * width)
    blocks = QueryBlocks(64)

    def measure(q, k, v, w):
        return attend_in_blocks(
            (q, k, v, None, None, w),
            blocks,
            lambda a: {"x": vx.leave_one_out(a.weights, a.values, w, a.output)},
        )

    def derivative(q, k, v, w):
        return jax.grad(lambda *x: jnp.sum(measure(*x, w)[0] ** 2), argnums=(0, 1, 2))(q, k, v)

    one_map = 4 * tokens**2
    assert temporary(measure, shape, shape, shape, kernel) < one_map + weights / 2
    assert temporary(derivative, shape, shape, shape, kernel) < weights


@pytest.mark.parametrize("batch", [(2,), (2, 2), (1,), ()])
@pytest.mark.parametrize("scale_output", [False, True])
def test_heads_joined_with_images_are_those_apart(batch, scale_output, monkeypatch):
    """As on one CPU; the tests have eight."""
    generator = np.random.default_rng(0)
    q, k, v, g = jnp.asarray(generator.normal(size=(4, *batch, N, H, K)), jnp.float32)

    def both():
        attended = explicit_attention(q, k, v, scale_output=scale_output)
        again = explicit_attention(q, k, v, rows=attended.rows)
        return attended, again, attention_gradients(attended, attended.output, g)

    apart = both()
    monkeypatch.setattr(softmax, "can_split_images", lambda: True)
    monkeypatch.setattr(attend_backward, "units_take", lambda dtype: True)
    assert (HeadsJoined.of(q, None, None).lead is None) == (not batch)
    assert HeadsJoined.of(q, None, jnp.ones((N, N), bool)).lead is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), both(), apart)
