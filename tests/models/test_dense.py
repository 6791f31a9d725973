"""The product of dense layers is `lax.dot_general`'s, in value, derivative and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vit_interact.models.dense import flat_dot_general


@pytest.mark.parametrize(
    ("lhs", "rhs", "numbers"),
    [
        ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),  # Dense
        ((2, 3, 4), (4, 2, 3), (((2,), (0,)), ((), ()))),  # to heads
        ((2, 3, 2, 3), (2, 3, 5), (((2, 3), (0, 1)), ((), ()))),  # from heads
        ((4,), (4, 5), (((0,), (0,)), ((), ()))),  # one token
        ((4, 3), (4, 5), (((0,), (0,)), ((), ()))),  # not the last axis: as it is
        ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),  # batched: as it is
    ],
)
def test_equals_dot_general(lhs, rhs, numbers):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (lhs, rhs))

    def both(product):
        def loss(a, b):
            found = product(a, b, numbers, precision=lax.Precision.HIGHEST)
            return jnp.sum(jnp.sin(found)), found

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(a, b)

    expected, found = both(lax.dot_general), both(flat_dot_general)
    assert found[0][1].shape == expected[0][1].shape
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_tokens_of_all_images_are_one_axis():
    a, b = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    numbers = (((2,), (0,)), ((), ()))
    jaxpr = jax.make_jaxpr(lambda a, b: flat_dot_general(a, b, numbers))(a, b)
    (product,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert [v.aval.shape for v in product.invars] == [(6, 4), (4, 5)]
