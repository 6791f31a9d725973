"""The Pallas kernels of attention within windows for GPUs, interpreted; and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import lowered
from tests.models.layers import close
from tests.models.windowed import both, boxes, equals_a_mask, inputs, masked
from vit_interact.layout import TokenLayout
from vit_interact.models import pallas_boxes


def attend(layout, windows):
    return lambda *a: pallas_boxes.attend(layout, *a, jnp.asarray(windows), interpret=True)


def around(layout, reach, batch=(2,)):
    """Windows that reach so far to all sides, in the grid: those of a tile have much in common."""
    place = layout.positions()
    corners = np.concatenate([place - reach, place + reach + 1], axis=-1)
    corners = np.clip(corners, 0, [layout.rows, layout.cols] * 2).astype(np.int32)
    return np.broadcast_to(corners, (*batch, *corners.shape)).copy()


@pytest.mark.parametrize(
    ("layout", "make", "reach"),
    [
        (TokenLayout(9, 17, 1), boxes, 4),  # tiles beyond the grid, both ways
        (TokenLayout(8, 8, 0), boxes, 3),  # no prefix token
        # Rings around inner boxes, cut by the grid's end: this file's longest case.
        pytest.param(TokenLayout(23, 33, 16), around, 11, marks=pytest.mark.slow),
        (TokenLayout(16, 16, 5), boxes, 40),  # windows of the whole grid: nothing to skip
    ],
)
def test_equals_a_mask_with_its_derivatives(layout, make, reach):
    windows = make(layout, reach)
    if reach < 40:
        windows[0, 2] = 0  # nobody's window, but it must give zeros as a mask does
        windows[1, :72] = 0  # whole tiles of them
    attend = functools.partial(pallas_boxes.attend, layout, interpret=True)
    equals_a_mask(attend, layout, windows)


@pytest.mark.slow
def test_bf16_and_vmap():
    layout = TokenLayout(12, 17, 1)
    q, k, v, g = inputs(layout)
    windows = around(layout, 6)
    expected, of_expected = both(lambda *a: masked(*a, windows, layout), g, q, k, v)
    half = [x.astype(jnp.bfloat16) for x in (g, q, k, v)]
    found, of_found = jax.jit(lambda *a: both(attend(layout, windows), *a))(*half)
    for a, b in zip((found, *of_found), (expected, *of_expected), strict=True):
        assert a.dtype == jnp.bfloat16
        close(a.astype(jnp.float32), b, 0.03)

    def one(q, k, v, windows):
        return attend(layout, windows[None])(q[None], k[None], v[None])[0]

    close(jax.jit(jax.vmap(one))(q, k, v, windows), expected)


def test_tiles_that_no_window_reaches_are_not_read():
    layout = TokenLayout(16, 16, 1)
    q, k, v, _ = inputs(layout, batch=(1,))
    windows = boxes(layout, 1, batch=(1,))  # each patch by itself
    row, col = layout.positions().T
    first = np.concatenate([[False], (row < 4) & (col < 8)])  # the first tile, of float32
    poison = ~first & (np.arange(257) > 0)
    k, v = (jnp.where(poison[:, None, None], jnp.nan, x) for x in (k, v))
    found = np.asarray(attend(layout, windows)(q, k, v))[0]
    assert np.isfinite(found[first]).all()
    assert np.isnan(found[0]).all()  # the prefix token reads all


def test_computed_share():
    layout = TokenLayout(16, 16, 1)
    alone = boxes(layout, 1, batch=(1,))[0]
    # Each of 8 tiles of 32 by itself and the prefix token, in a step of 16; that one with all.
    expected = 32 * (8 * (32 + 16) + 256 + 16) / 257**2
    found = pallas_boxes.computed_share(alone, layout, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Tiles of 64 then; a window that reaches one row further adds a tile of keys.
    alone[3, 2] = 9
    both_ways = np.stack([alone, np.tile(np.int32([0, 0, 16, 16]), (256, 1))])
    found = pallas_boxes.computed_share(both_ways, TokenLayout(16, 16, 0), jnp.bfloat16)
    np.testing.assert_allclose(found, [5 / 16, 1.0], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("side", "prefix", "dtype"), [(14, 5, "bfloat16"), (64, 1, "bfloat16"), (37, 0, "float32")]
)
def test_kernels_lower_for_cuda(side, prefix, dtype):
    pytest.importorskip("jax.experimental.pallas.triton", reason="this jax has no Triton")
    layout = TokenLayout(side, side, prefix)
    tokens = jax.ShapeDtypeStruct((2, layout.num_tokens, 6, 64), dtype)
    windows = jax.ShapeDtypeStruct((2, layout.num_patches, 4), "int32")

    def derivatives(q, k, v, windows, g):
        return both(lambda *a: pallas_boxes.attend(layout, *a, windows), g, q, k, v)

    text = lowered(derivatives, "cuda", tokens, tokens, tokens, windows, tokens)
    for name in ("windows", "windows_queries", "windows_keys"):
        assert f'vit_interact_{name}"' in text
    assert text.count("@xla.gpu.triton") + text.count("@__gpu$xla.gpu.triton") == 3


def test_what_tiles_cannot_do_is_said():
    assert pallas_boxes.suitable_tiles(TokenLayout(7, 20, 1), jnp.bfloat16) is None
    assert pallas_boxes.suitable_tiles(TokenLayout(7, 20, 17), jnp.float32) is None
    layout = TokenLayout(7, 7, 1)
    heads = (x.astype(jnp.bfloat16) for x in inputs(layout)[:3])
    with pytest.raises(ValueError, match="a grid of a tile"):
        attend(layout, boxes(layout, 2))(*heads)
