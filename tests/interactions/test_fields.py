"""Responsive fields against a loop in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_interact.interactions.fields import responsive_field
from vit_interact.layout import TokenLayout


def reference(rows, layout):
    """METHOD's definition, one query at a time; the angle is left out where axes are equal."""
    out = []
    position = layout.positions().astype(np.float64)
    for i, row in enumerate(np.asarray(rows, np.float64)):
        if row.sum() == 0:
            out.append([np.full(2, np.nan), np.nan, np.full(2, np.nan), np.nan, np.nan, np.nan])
            continue
        w = row / row.sum()
        offset = position - position[i]
        tendency = w @ offset
        spread = math.sqrt(w @ (offset**2).sum(1))
        about = position - w @ position
        values, vectors = np.linalg.eigh((about * w[:, None]).T @ about)
        small, large = np.maximum(values, 0)
        vertical, horizontal = vectors[:, 1]
        angle = math.atan2(vertical, horizontal)
        angle = angle - math.pi if angle > math.pi / 2 else angle
        angle = angle + math.pi if angle <= -math.pi / 2 else angle
        eccentricity = math.sqrt(1 - small / large) if large > 0 else 0.0
        seen = w[w > 0]
        entropy = -(seen * np.log(seen)).sum() / math.log(layout.num_patches)
        axes = np.array([math.sqrt(large), math.sqrt(small)])
        out.append([tendency, spread, axes, angle, eccentricity, entropy])
    return [np.stack(field) for field in zip(*out, strict=True)]


def angle_apart(a, b):
    """Angles of axes, which are the same after half a turn."""
    return abs((a - b + np.pi / 2) % np.pi - np.pi / 2)


@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (6, 1), (37, 37)])
def test_fields_are_those_of_the_loop(grid):
    layout = TokenLayout(*grid)
    rng = np.random.default_rng(0)
    rows = rng.random((layout.num_patches,) * 2).astype(np.float32) ** 8
    rows[2] = 0
    field = responsive_field(rows, layout)
    expected = reference(rows, layout)
    for name, actual, wanted in zip(field._fields, field, expected, strict=True):
        assert actual.dtype == jnp.float32
        if name == "angle":
            apart = angle_apart(actual, wanted)[field.eccentricity > 0.05]
            assert np.nanmax(apart) < 1e-3
            assert np.isnan(actual[2])
        else:
            atol = 2e-3 if name == "eccentricity" else 2e-5
            np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (-1, 1), (1, 2), (-2, 1)])
def test_a_line_far_from_its_query_has_no_minor_axis(step):
    """Covariances taken about the query, or about the corner, would cancel here."""
    layout = TokenLayout(37, 37)
    row, col = 30 + np.arange(3) * step[0], 30 + np.arange(3) * step[1]
    rows = np.zeros((1369, 1369), np.float32)
    rows[:, row * 37 + col] = 1 / 3
    rows[:, row[1] * 37 + col[1]] += 1e-3
    field = responsive_field(rows, layout)
    angle = math.atan2(*step) if step[1] else math.pi / 2
    np.testing.assert_allclose(field.angle, angle, atol=1e-5)
    assert (field.angle > -np.pi / 2).all()
    np.testing.assert_allclose(
        field.axes[0, 0], math.hypot(*step) * math.sqrt(2 / 3.003), rtol=1e-5
    )
    assert field.axes[:, 1].max() < 1e-5
    np.testing.assert_allclose(field.eccentricity, 1, atol=1e-6)


def test_round_and_single_patch_fields():
    layout = TokenLayout(3, 3)
    rows = np.zeros((9, 9), np.float32)
    rows[4] = 1
    rows[0, 8] = 5
    rows[8, 8] = 5
    field = responsive_field(rows, layout)
    assert field.tendency[4].tolist() == [0, 0]
    assert float(field.entropy[4]) == pytest.approx(1)
    assert float(field.eccentricity[4]) == pytest.approx(0, abs=1e-3)
    assert float(field.angle[4]) == 0
    assert field.tendency[0].tolist() == [2, 2]
    assert float(field.spread[0]) == pytest.approx(math.sqrt(8))
    for i in (0, 8):
        assert field.axes[i].tolist() == [0, 0]
        assert float(field.eccentricity[i]) == 0
        assert float(field.entropy[i]) == 0
    assert float(field.spread[8]) == 0
    for values in field:
        assert np.isnan(values[jnp.array([1, 2, 3, 5, 6, 7])]).all()


def test_one_patch_grid():
    field = responsive_field(np.ones((1, 1), np.float32), TokenLayout(1, 1))
    for values in field:
        assert (np.asarray(values) == 0).all()


def test_leading_axes_jit_vmap_and_bfloat16():
    layout = TokenLayout(4, 5)
    maps = np.random.default_rng(1).integers(0, 9, (2, 3, 20, 20)).astype(np.float32)
    call = jax.jit(lambda x: responsive_field(x, layout))
    expected = call(maps)
    for other in (jax.vmap(call)(maps), call(jnp.asarray(maps, jnp.bfloat16)), call(maps * 1e30)):
        for name, values, wanted in zip(expected._fields, other, expected, strict=True):
            np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
    assert expected.tendency.shape == (2, 3, 20, 2)
    assert expected.axes.shape == (2, 3, 20, 2)
    assert expected.spread.shape == (2, 3, 20)


def edge_cases():
    """Rows where a square root, logarithm or angle has no derivative."""
    rows = np.zeros((9, 9), np.float32)
    rows[0, 0] = 1  # one patch, its own
    rows[1] = 1  # all alike
    rows[2, [3, 5]] = 1  # a line
    rows[3, [1, 3, 5, 7]] = 1  # round
    rows[4, 4], rows[4, 0] = 1, 1e-30
    return jnp.asarray(rows)  # the others are zeros


@pytest.mark.parametrize("name", ["tendency", "spread", "axes", "angle", "eccentricity", "entropy"])
def test_gradients_are_finite_everywhere(name):
    def total(rows):
        return jnp.nansum(getattr(responsive_field(rows, TokenLayout(3, 3)), name))

    assert np.isfinite(jax.grad(total)(edge_cases())).all()


@pytest.mark.parametrize("name", ["tendency", "spread", "axes", "angle", "eccentricity", "entropy"])
def test_gradients_are_those_of_differences(name):
    layout = TokenLayout(3, 4)
    rng = np.random.default_rng(2)
    rows = rng.random((12, 12)).astype(np.float32) + 0.05
    direction = rng.standard_normal((12, 12)).astype(np.float32)
    weight = rng.standard_normal((12, 2)).astype(np.float32)

    def total(x):
        values = getattr(responsive_field(x, layout), name)
        return (values * (weight if values.ndim == 2 else weight[:, 0])).sum()

    slope = float((jax.grad(total)(rows) * direction).sum())
    step = 2e-3
    difference = (total(rows + step * direction) - total(rows - step * direction)) / (2 * step)
    assert slope == pytest.approx(float(difference), rel=0.02, abs=0.02)


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="patch_indicator has shape"):
        responsive_field(np.ones((5, 5), np.float32), TokenLayout(2, 2))
