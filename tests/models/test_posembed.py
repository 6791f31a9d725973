"""Resized position embeddings against torch, SciPy and a golden file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import golden
from vit_interact.models.posembed import resize_position_embedding, sincos_position_embedding

# Up, down, sideways, by much and by little.
GRIDS = [((4, 4), (7, 5)), ((7, 7), (3, 4)), ((16, 16), (37, 37)), ((37, 37), (16, 16)),
         ((5, 9), (6, 8)), ((3, 1), (1, 4))]  # fmt: skip


def embedding(grid, prefix, width=8):
    rows = prefix + grid[0] * grid[1]
    return np.random.default_rng(0).normal(size=(1, rows, width)).astype(np.float32)


@pytest.mark.parametrize("old,new", GRIDS)
@pytest.mark.parametrize("method", ["bicubic_antialias", "bicubic"])
def test_bicubic_is_that_of_torch(old, new, method):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    pos = embedding(old, prefix=2)
    ours = resize_position_embedding(pos, old, new, prefix=2, method=method)
    grid = torch.from_numpy(pos[0, 2:].T.reshape(1, -1, *old))
    theirs = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", align_corners=False, antialias=method != "bicubic"
    ).numpy()
    np.testing.assert_allclose(ours[0, 2:].T.reshape(1, -1, *new), theirs, atol=5e-6)
    np.testing.assert_array_equal(ours[:, :2], pos[:, :2])


@pytest.mark.parametrize("old,new", GRIDS)
def test_bilinear_is_that_of_scipy(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    pos = embedding(old, prefix=1)
    ours = resize_position_embedding(pos, old, new, prefix=1, method="bilinear")
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    theirs = ndimage.zoom(pos[0, 1:].reshape(*old, -1), zoom, order=1)
    np.testing.assert_allclose(ours[0, 1:].reshape(*new, -1), theirs, atol=2e-6)


def test_golden_file():
    expected = golden("posembed.npz")
    for method in ("bicubic_antialias", "bicubic", "bilinear"):
        for case in range(2):
            old, new = (
                tuple(int(n) for n in expected[f"{side}_{case}"]) for side in ("old", "new")
            )
            ours = resize_position_embedding(expected[f"pos_{case}"], old, new, 1, method)
            np.testing.assert_allclose(ours, expected[f"{method}_{case}"], atol=5e-6)


def test_equal_grid_and_constant_embedding_stay():
    pos = embedding((3, 5), prefix=1)
    np.testing.assert_array_equal(resize_position_embedding(pos, (3, 5), (3, 5), 1), pos)
    flat = np.full((1, 16, 4), 2.5, np.float32)
    for method in ("bicubic_antialias", "bicubic", "bilinear"):
        resized = resize_position_embedding(flat, (4, 4), (9, 3), method=method)
        np.testing.assert_allclose(resized, 2.5, atol=1e-6)


def test_runs_under_jit_and_keeps_bfloat16():
    pos = jnp.asarray(embedding((4, 4), prefix=0), jnp.bfloat16)
    resize = jax.jit(lambda p: resize_position_embedding(p, (4, 4), (5, 6)))
    assert resize(pos).dtype == jnp.bfloat16
    assert resize(pos).shape == (1, 30, 8)


def test_wrong_grid_or_method_is_named():
    with pytest.raises(ValueError, match="has 17 rows; a grid of 4x5 and 1 prefix tokens need 21"):
        resize_position_embedding(embedding((4, 4), 1), (4, 5), (2, 2), 1)
    with pytest.raises(Exception, match="nearest"):
        resize_position_embedding(embedding((4, 4), 0), (4, 4), (2, 2), 0, "nearest")


def test_sincos_against_loops():
    pos = sincos_position_embedding((2, 3), 16)
    assert pos.shape == (1, 6, 16) and pos.dtype == np.float32
    for patch in range(6):
        y, x = divmod(patch, 3)
        for k in range(4):
            w = 1 / 10_000 ** (k / 3)
            expected = [np.sin(x * w), np.cos(x * w), np.sin(y * w), np.cos(y * w)]
            np.testing.assert_allclose(pos[0, patch, k::4], expected, atol=1e-6)
