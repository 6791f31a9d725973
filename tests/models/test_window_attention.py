"""Attention that skips keys outside of windows against a mask over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.layers import close
from tests.models.windowed import boxes, equals_a_mask, inputs, masked
from vit_interact.layout import TokenLayout
from vit_interact.models.patch_blocks import hilbert, needed_blocks, patch_blocks
from vit_interact.models.window_attention import computed_share, window_attention


@pytest.mark.parametrize(
    ("layout", "reach"),
    [
        (TokenLayout(16, 16, 1), 3),  # whole blocks
        (TokenLayout(19, 13, 5), 4),  # a block that is not full
        (TokenLayout(9, 25, 0), 3),  # no prefix token
        (TokenLayout(41, 33, 1), 3),  # six blocks, in up to three steps
        (TokenLayout(11, 11, 1), 40),  # windows of the whole grid: nothing to skip
        (TokenLayout(3, 2, 1), 1),  # less than a block; each patch alone
    ],
)
def test_equals_a_mask_with_its_derivatives(layout, reach):
    windows = boxes(layout, reach)
    equals_a_mask(lambda *a: window_attention(*a, layout), layout, windows)


def test_leading_axes_one_set_of_windows_and_vmap():
    layout = TokenLayout(12, 10, 1)
    q, k, v, _ = inputs(layout, batch=(2, 2))
    windows = boxes(layout, 4, batch=())
    expected = masked(q, k, v, windows, layout)
    attend = jax.jit(lambda q, k, v: window_attention(q, k, v, windows, layout))
    close(attend(q, k, v), expected)
    close(jax.jit(jax.vmap(attend))(q, k, v), expected)


def test_bf16_and_windows_that_hold_nothing():
    layout = TokenLayout(10, 10, 0)
    q, k, v, _ = inputs(layout, batch=())
    windows = boxes(layout, 4, batch=())
    windows[7] = 0  # nobody's window, but it must give zeros as a mask does
    attend = jax.jit(lambda q, k, v: window_attention(q, k, v, windows, layout))
    found = attend(q, k, v)
    close(found, masked(q, k, v, windows, layout))
    assert (np.asarray(found[7]) == 0).all()
    half = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), found, 0.03)


@pytest.mark.parametrize("layout", [TokenLayout(8, 8), TokenLayout(37, 37), TokenLayout(5, 70)])
def test_blocks_hold_each_patch_once(layout):
    blocks = patch_blocks(layout)
    patches = blocks.patches[blocks.real]
    assert sorted(patches) == list(range(layout.num_patches))
    for number, (top, left, bottom, right) in enumerate(blocks.box):
        row, col = layout.positions()[blocks.patches[number][blocks.real[number]]].T
        assert (row.min(), col.min(), row.max() + 1, col.max() + 1) == (top, left, bottom, right)


def test_neighbours_on_the_curve_are_neighbours_on_the_grid():
    row, col = TokenLayout(16, 16).positions().T
    order = np.argsort(hilbert(row, col))
    assert sorted(hilbert(row, col)) == list(range(256))
    steps = np.abs(np.diff(row[order])) + np.abs(np.diff(col[order]))
    assert (steps == 1).all()


def test_needed_blocks_by_hand():
    layout = TokenLayout(8, 8, 1)  # two blocks of 32 patches: the left half, then the right one
    place = layout.positions()
    windows = np.concatenate([place, place + 1], axis=1)
    np.testing.assert_array_equal(needed_blocks(windows, layout, 32), np.eye(2, dtype=bool))
    windows[0] = [0, 0, 1, 5]  # patch 0 sees one patch of the right half
    found = needed_blocks(windows, layout, 32)
    np.testing.assert_array_equal(found, [[True, True], [False, True]])


def test_products_by_hand():
    """Patches that see themselves: a step for each block, and the prefix token on both sides."""
    for side, blocks in ((8, 1), (16, 1), (32, 4)):
        layout = TokenLayout(side, side, 1)
        place = layout.positions()
        windows = np.concatenate([place, place + 1], axis=1)
        step = min(blocks, 2) * 256
        tokens = layout.num_tokens
        products = blocks * step * 256 + tokens + blocks * 256
        found = computed_share(windows, layout)
        np.testing.assert_allclose(found, products / tokens**2, rtol=1e-6)


def test_wrong_shapes_are_refused():
    layout = TokenLayout(4, 4, 1)
    q, k, v, _ = inputs(layout)
    with pytest.raises(ValueError, match=r"expected windows \[..., 16, 4\]"):
        window_attention(q, k, v, np.zeros((15, 4), np.int32), layout)
    with pytest.raises(ValueError, match="has 26 tokens"):
        window_attention(q, k, v, np.zeros((25, 4), np.int32), TokenLayout(5, 5, 1))
