"""What a forward pass keeps of each row of the softmax, and backward passes that start from it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import layers
from tests.models.helpers import bodies_of_ynnpack
from tests.models.layers import close
from vit_interact.layout import TokenLayout
from vit_interact.models.attend import QueryBlocks, attend_in_blocks, explicit_attention
from vit_interact.models.attend_backward import gradients_in_blocks
from vit_interact.models.cpu import compiler_options
from vit_interact.models.softmax import (
    ROWS,
    Rows,
    attention_logits,
    softmax_of,
    softmax_parts,
)
from vit_interact.models.zoo import create_model
from vit_interact.observe.maps import Maps

LAYOUT = TokenLayout(3, 4, 2)
N, H, K = LAYOUT.num_tokens, 4, 5
BACKWARD = Maps(("edge", "gradient"))
BLOCKS = [
    QueryBlocks(99),
    QueryBlocks(5),
    QueryBlocks(6, LAYOUT),
    QueryBlocks(99, heads=1),
    QueryBlocks(5, heads=2, images=2),
]
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")

layer = functools.partial(layers.layer, (N, H, K), 3)


def masked(batch):
    mask = np.random.default_rng(0).random((*batch, 1, N, N)) < 0.7
    mask[..., 3, :] = False  # attends to nothing
    return jnp.asarray(mask)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_rows_are_those_of_the_softmax(batch, blocks):
    q, k, v, kernel, _ = layer(batch)
    for mask in (None, masked(batch)):
        inputs = (q, k, v, None, mask, kernel)
        run = lambda inputs: attend_in_blocks(inputs, blocks, keep=True)[1]  # noqa: E731
        found = jax.jit(run)(inputs)
        logits = np.einsum("...ihk,...jhk->...ihj", *(np.asarray(x, np.float64) for x in (q, k)))
        if mask is not None:
            logits = np.where(np.swapaxes(mask, -3, -2), logits, -np.inf)
        total = np.exp(logits).sum(-1, keepdims=True)
        assert set(found) == set(ROWS)
        with np.errstate(divide="ignore"):
            expected = np.where(total > 0, np.log(total), np.inf)
        np.testing.assert_allclose(found["log_sum"], expected, rtol=1e-5, atol=1e-5)
        largest = np.exp(logits.max(-1, keepdims=True)) / np.where(total > 0, total, 1)
        close(found["largest"], largest)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_gradients_from_rows_are_those_without(batch, blocks):
    q, k, v, kernel, g = layer(batch)
    for mask in (None, masked(batch)):
        inputs = (q, k, v, None, mask, kernel)

        @jax.jit
        def both(inputs, g):
            output, found = attend_in_blocks(inputs, blocks, keep=True)
            rows = Rows(**found)
            graded = functools.partial(gradients_in_blocks, inputs, blocks, BACKWARD, output, g)
            return graded(rows), graded()

        for one, other in zip(*map(jax.tree.leaves, both(inputs, g)), strict=True):
            close(one, other)


def test_a_row_with_every_key_masked_stays_zero():
    q, k, v, _, _ = layer()
    mask = masked((2,))
    whole = explicit_attention(q, k, v, None, mask)
    again = explicit_attention(q, k, v, None, mask, rows=whole.rows)
    close(again.weights, whole.weights)
    assert not np.any(again.weights[..., 3, :])
    assert np.all(np.isfinite(again.output))


@pytest.mark.parametrize("is_masked", [False, True])
def test_weights_from_rows_have_the_derivative_of_the_softmax(is_masked):
    """Second derivatives of a score go through the rows, too."""
    q, k, *_ = layer(())
    mask = masked(())[0] if is_masked else None
    logits = attention_logits(q[:, 0], k[:, 0], None, mask)
    factors = jnp.asarray(np.random.default_rng(1).normal(size=logits.shape), jnp.float32)

    def plain(logits):
        return jnp.sum(factors * softmax_of(logits, mask)[0])

    def by_rows(logits):
        rows = softmax_parts(logits, mask)[1]
        return jnp.sum(factors * softmax_of(logits, mask, rows)[0])

    close(jax.jit(jax.grad(by_rows))(logits), jax.jit(jax.grad(plain))(logits))


TOKENS, WIDTH, HEADS = 800, 64, 2
_SIDES = [jax.ShapeDtypeStruct((1, TOKENS, HEADS, WIDTH), jnp.float32)] * 5
_ONE_HEAD = QueryBlocks(TOKENS, heads=1)


def compiled(run, *shapes):
    told = compiler_options(create_model("vit_s14", image_size=518), 1)
    return jax.jit(run, compiler_options=told).lower(*shapes).compile()


@on_cpu
def test_the_product_before_a_maximum_is_left_alone():
    """In YNNPACK's loop over rows, product, maximum and exponentials take 1.5 times as long."""
    run = lambda *sides: attend_in_blocks((*sides, None, None, None), _ONE_HEAD)[0]  # noqa: E731
    bodies = bodies_of_ynnpack(compiled(run, *_SIDES[:3]))
    if not bodies:
        pytest.skip("this XLA leaves nothing to YNNPACK")
    assert not [body for body in bodies if " dot(" in body and " reduce(" in body]


@on_cpu
def test_no_sum_of_a_row_is_written_for_each_key():
    def run(q, k, v, o, g, log_sum, largest):
        inputs, rows = (q, k, v, None, None, None), Rows(log_sum, largest)
        return gradients_in_blocks(inputs, _ONE_HEAD, Maps(("gradient",)), o, g, rows)

    of_rows = jax.ShapeDtypeStruct((1, TOKENS, HEADS, 1), jnp.float32)
    bodies = bodies_of_ynnpack(compiled(run, *_SIDES, of_rows, of_rows))
    if not bodies:
        pytest.skip("this XLA leaves nothing to YNNPACK")
    pattern = rf"f32\[{TOKENS},{TOKENS}\]\S* broadcast\("
    assert not [body for body in bodies if re.search(pattern, body)]
