"""Arrays of one attention layer."""

import jax
import jax.numpy as jnp
import numpy as np


def layer(shape, sharpness, batch=(2,), dtype=jnp.float32, seed=0):
    """Query, key, value, output kernel and a gradient of the output; some keys dominate.

    `shape` is that of an array without its batch, `[N, H, K]`.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k, v, g = (jax.random.normal(key, (*batch, *shape), dtype) for key in keys[:4])
    return sharpness * q, k, v, jax.random.normal(keys[4], (*shape[1:], 7), dtype), g


def close(found, expected, tolerance=1e-5):
    """Whether arrays differ by less than a share of the largest entry; NaN equals NaN."""
    expected = np.asarray(expected, np.float32)
    largest = np.nanmax(np.abs(expected))
    assert largest > 0
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, expected, atol=tolerance * largest, rtol=0)
