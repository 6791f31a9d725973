"""Boxes against boxes worked out by hand, NumPy, and windows of whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from vit_interact import interactions as vx
from vit_interact.interactions.boxes import (
    box_area,
    clipped_boxes,
    giou,
    hard_windows,
    iou,
    soft_window,
    unclipped_boxes,
    window_guidance,
)

LAYOUT = vi.TokenLayout(rows=4, cols=5, prefix=2)


def distances(seed=0, high=4.0, batch=(2,)):
    return jnp.asarray(np.random.default_rng(seed).uniform(0, high, (*batch, 20, 4)))


def test_soft_windows_are_the_formula():
    d, tau = np.asarray(distances(), float), 0.7
    soft = soft_window(jnp.asarray(d), LAYOUT, tau)
    found = np.exp(soft.rows[..., :, None] + soft.cols[..., None, :]).reshape(2, 20, 20)

    def s(x):
        return 1 / (1 + np.exp(-x / tau))

    for b in range(2):
        for i in range(20):
            (ri, ci), (t, left, bottom, right) = divmod(i, 5), d[b, i]
            for j in range(20):
                rj, cj = divmod(j, 5)
                expected = s(rj - ri + t + 0.5) * s(ri + bottom + 0.5 - rj)
                expected *= s(cj - ci + left + 0.5) * s(ci + right + 0.5 - cj)
                assert found[b, i, j] == pytest.approx(expected, rel=1e-4)


def test_soft_windows_sharpen_into_hard_ones():
    d = distances(1)
    # Where a border falls on a patch exactly there is no limit.
    d = jnp.where(jnp.abs(d % 1 - 0.5) < 0.05, d + 0.1, d)
    masks = vx.window_mask(hard_windows(d, LAYOUT), LAYOUT)[..., 2:, 2:]
    errors = []
    for tau in (1.0, 0.1, 0.005):
        soft = soft_window(d, LAYOUT, tau)
        m = jnp.exp(soft.rows[..., :, None] + soft.cols[..., None, :]).reshape(2, 20, 20)
        errors.append(float(jnp.abs(m - masks).max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_boxes_by_hand():
    d = jnp.zeros((20, 4)).at[7].set(jnp.array([0.4, 2.6, 9.0, 0.5]))
    boxes = unclipped_boxes(d, LAYOUT)
    np.testing.assert_allclose(boxes[0], [0, 0, 1, 1])
    np.testing.assert_allclose(boxes[7], [0.6, -0.6, 11, 3.5], rtol=1e-6)
    np.testing.assert_array_equal(hard_windows(d, LAYOUT)[7], [1, 0, 4, 4])
    np.testing.assert_array_equal(hard_windows(d, LAYOUT)[6], [1, 1, 2, 2])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),
        ([0, 0, 2, 2], [0, 0, 4, 4], 0.25),  # nested: the hull is the larger one
        ([0, 0, 2, 2], [0, 2, 2, 4], 0.0),  # touching
        ([0, 0, 1, 1], [0, 3, 1, 4], -0.5),  # disjoint
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7 - 2 / 9),
        ([1, 1, 1, 1], [0, 0, 2, 2], 0.0),  # a point
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),
        ([0, 0, 0, 2], [2, 0, 2, 2], -1.0),  # lines
    ],
)
def test_giou_by_hand(one, other, expected):
    pair = [jnp.array(box, jnp.float32) for box in (one, other)]
    assert float(giou(*pair)) == pytest.approx(expected, abs=1e-6)
    assert float(giou(*pair[::-1])) == pytest.approx(expected, abs=1e-6)
    gradient = jax.grad(lambda a, b: giou(a, b))(*pair)
    assert np.isfinite(gradient).all()


def test_giou_has_true_gradients():
    boxes, others = (unclipped_boxes(distances(seed, batch=()), LAYOUT) for seed in (2, 3))
    with jax.enable_x64(True):
        boxes, others = (jnp.asarray(np.asarray(x), jnp.float64) for x in (boxes, others))
        gradient = jax.grad(lambda a: giou(a, others).sum())(boxes)
        step = jnp.asarray(np.random.default_rng(4).normal(size=boxes.shape))
        ends = [giou(boxes + h * step, others).sum() for h in (1e-6, -1e-6)]
        assert float((gradient * step).sum()) == pytest.approx(
            float(ends[0] - ends[1]) / 2e-6, rel=1e-5
        )


def test_any_leading_axes_and_vmap():
    d = distances(batch=(2, 3))
    for function in (unclipped_boxes, hard_windows):
        whole = function(d, LAYOUT)
        mapped = jax.vmap(jax.vmap(lambda one, f=function: f(one, LAYOUT)))(d)
        np.testing.assert_array_equal(whole, mapped)
    assert soft_window(d.astype(jnp.bfloat16), LAYOUT).rows.shape == (2, 3, 20, 4)


def test_guidance_pulls_boxes_into_windows():
    windows = vx.smallest_windows(
        jnp.asarray(np.random.default_rng(6).dirichlet(np.full(20, 0.3), (20,))), LAYOUT, 0.7
    )
    # As before training: every box holds the grid and more.
    start = jnp.full((20, 4), 8.0)
    loss = jax.jit(jax.value_and_grad(lambda d: window_guidance(d, windows, LAYOUT)))
    first, gradient = loss(start)
    assert np.isfinite(gradient).all() and (np.asarray(gradient) > 0).all()
    d = start
    for _ in range(600):
        _, gradient = loss(d)
        d = jnp.maximum(d - 0.02 * jnp.sign(gradient), 0)
    assert float(loss(d)[0]) < 0.1 < float(first)
    np.testing.assert_array_equal(hard_windows(d, LAYOUT), windows)


def test_guidance_leaves_out_patches_that_do_not_count():
    d = distances(7)
    windows = hard_windows(distances(8), LAYOUT)
    counts = jnp.asarray(np.random.default_rng(9).random((2, 20)) < 0.5).at[1].set(False)
    found = window_guidance(d, windows, LAYOUT, counts)
    each = 1 - giou(unclipped_boxes(d, LAYOUT), windows.astype(jnp.float32))
    assert float(found[0]) == pytest.approx(float(each[0][counts[0]].mean()), rel=1e-5)
    assert float(found[1]) == 0
    np.testing.assert_allclose(window_guidance(d, windows, LAYOUT), each.mean(axis=-1), rtol=1e-5)


def test_shared_area_by_hand():
    boxes = jnp.asarray([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 3, 2]], jnp.float32)
    others = jnp.asarray([[1, 0, 3, 2], [2, 2, 3, 3], [0, 0, 0, 0], [1, 1, 3, 2]], jnp.float32)
    np.testing.assert_allclose(iou(boxes, others), [2 / 6, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(box_area(boxes), [4, 1, 0, 2])


def test_boxes_end_at_the_grid():
    layout = vi.TokenLayout(2, 3, 1)
    distances = jnp.full((6, 4), 9.0).at[0].set(0.0)
    boxes = clipped_boxes(distances, layout)
    np.testing.assert_allclose(boxes[0], [0, 0, 1, 1])
    np.testing.assert_allclose(boxes[1:], np.tile([0, 0, 2, 3], (5, 1)))
