"""Made-up attention within windows, and what it must equal."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.layers import close
from vit_interact.interactions.window_masks import window_mask
from vit_interact.models.attend import explicit_attention

H, K = 2, 6


def inputs(layout, batch=(2,), seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (*batch, layout.num_tokens, H, K)
    return tuple(jax.random.normal(key, shape) for key in keys)


def boxes(layout, reach, batch=(2,), seed=0):
    """Windows that reach 0 to `reach - 1` patches to each side of their patch."""
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, reach, (2, *batch, layout.num_patches, 2))
    place = layout.positions()
    corners = np.concatenate([place - before, place + after + 1], axis=-1)
    return np.clip(corners, 0, [layout.rows, layout.cols] * 2).astype(np.int32)


def masked(q, k, v, windows, layout):
    mask = jnp.expand_dims(window_mask(windows, layout), -3)
    return explicit_attention(q, k, v, None, mask).output


def both(function, g, *arrays):
    """The output, and the derivatives along `g`."""
    output, pull = jax.vjp(function, *arrays)
    return output, pull(g)


def equals_a_mask(attend, layout, windows):
    """Asserts that `attend(q, k, v, windows)` is attention with a mask, and so are its derivatives.

    All of it is arguments: of constants, jaxlib 0.8.0 folds derivatives to nonsense.
    """
    q, k, v, g = inputs(layout)
    run = jax.jit(lambda windows, *a: both(lambda *heads: attend(*heads, windows), *a))
    found, of_found = run(jnp.asarray(windows), g, q, k, v)
    dense = lambda *a: masked(*a, windows, layout)  # noqa: E731
    expected, of_expected = jax.jit(lambda *a: both(dense, g, *a))(q, k, v)
    close(found, expected)
    for a, b in zip(of_found, of_expected, strict=True):
        close(a, b)
