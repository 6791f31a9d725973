"""Received impact and the order of removal against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_interact.interactions import removal
from vit_interact.layout import TokenLayout


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("include_prefix", [True, False])
def test_received_impact_is_the_loop(prefix, include_prefix):
    layout = TokenLayout(2, 3, prefix)
    n = layout.num_tokens
    indicator = np.random.default_rng(0).random((2, 2, n, n)).astype(np.float32)
    expected = np.zeros((2, 2, 6))
    for j in range(6):
        for i in range(0 if include_prefix else prefix, n):
            if i != prefix + j:
                expected[..., j] += indicator[..., i, prefix + j]
    call = jax.jit(lambda x: removal.received_impact(x, layout, include_prefix))
    np.testing.assert_allclose(call(indicator), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(call)(indicator), expected, rtol=1e-6)
    rough = removal.received_impact(jnp.asarray(indicator, jnp.bfloat16), layout, include_prefix)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, expected, rtol=0.01)


def test_prefix_tokens_count_unless_asked_otherwise():
    layout = TokenLayout(1, 2, prefix=1)
    indicator = np.array([[0, 8, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    assert removal.received_impact(indicator, layout).tolist() == [9, 0]
    assert removal.received_impact(indicator, layout, include_prefix=False).tolist() == [1, 0]


def test_what_a_patch_does_to_itself_does_not_swallow_the_rest():
    layout = TokenLayout(1, 3, prefix=0)
    indicator = np.full((3, 3), 1e-3, np.float32) + np.eye(3, dtype=np.float32) * 1e9
    np.testing.assert_allclose(removal.received_impact(indicator, layout), 2e-3, rtol=1e-6)
    indicator[0, 0] = np.inf
    np.testing.assert_allclose(removal.received_impact(indicator, layout), 2e-3, rtol=1e-6)


def test_gradient_of_received_impact():
    layout = TokenLayout(1, 3, prefix=1)
    grad = jax.grad(lambda x: removal.received_impact(x, layout)[1])(jnp.ones((4, 4)))
    assert grad[:, 2].tolist() == [1, 1, 0, 1]
    assert grad.sum() == 3


def test_order_is_ascending_and_stable():
    impact = np.array([[3, 1, 2, 1, 0, 3], [0, 0, 0, 0, 0, 0]], np.float32)
    order = removal.removal_order(impact)
    assert order.dtype == jnp.int32
    assert order.tolist() == [[4, 1, 3, 2, 0, 5], [0, 1, 2, 3, 4, 5]]
    assert jax.jit(jax.vmap(removal.removal_order))(impact).tolist() == order.tolist()
    ties = np.random.default_rng(1).integers(0, 4, 1369).astype(np.float32)
    expected = sorted(range(1369), key=lambda j: (ties[j], j))
    assert removal.removal_order(ties).tolist() == expected


def test_signed_zeros_are_equal_and_nan_comes_last():
    impact = np.array([0.0, -0.0, np.nan, 1.0], np.float32)
    assert removal.removal_order(impact).tolist() == [0, 1, 3, 2]


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="indicator has shape"):
        removal.received_impact(np.ones((4, 4), np.float32), TokenLayout(2, 2, prefix=1))
