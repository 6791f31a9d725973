import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import stacked, tiny
from vit_interact.models.attention import Taps
from vit_interact.models.vit import ViT


def every_edge(model, layers, images=2):
    tokens = model.config.layout.num_tokens
    grid = np.mgrid[:images, :tokens, :tokens].reshape(3, -1).T
    return np.concatenate([np.insert(grid, 1, layer, axis=1) for layer in layers])


def test_equals_a_whole_run_with_the_mask():
    model, params, images = tiny()
    edges = np.array([[0, 1, 3, 4], [1, 0, 0, 12], [1, 2, 0, 2], [0, 1, 3, 3]])
    changes = vi.ablate_edges(model, params, images, edges, score=2, batch_size=3)
    assert changes.dtype == np.float64
    with jax.enable_x64(True):
        exact = ViT(dataclasses.replace(model.config, dtype="float64"), taps=Taps())
        wide = {"params": jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)}
        pictures = jnp.asarray(images, jnp.float64)
        for (image, layer, i, j), change in zip(edges, changes, strict=True):
            mask = jnp.ones((13, 13), bool).at[i, j].set(False)
            masks = [mask if at == layer else None for at in range(3)]
            logits = exact.apply(wide, pictures, mask=masks)
            base = exact.apply(wide, pictures)
            np.testing.assert_allclose(change, (logits - base)[image, 2], atol=1e-11)


def test_edge_knows_the_truth():
    """First order against really cut edges; small parameters keep the model near linear."""
    model, params, images = tiny()
    params = jax.tree.map(lambda a: 0.5 * a, params)
    edges = every_edge(model, layers=(0, 1))
    truth = vi.ablate_edges(model, params, images, edges, score=1)
    maps = vi.measure(model, params, images, ("edge",), score=1)
    image, layer, i, j = edges.T

    def rank(x):
        return np.argsort(np.argsort(x))

    def rho(name):
        return np.corrcoef(rank(np.asarray(maps[name])[layer, image, i, j]), rank(np.abs(truth)))[
            0, 1
        ]

    assert rho("edge") > 0.999


def test_leave_one_out_equals_recomputing():
    """One head: masking the key and recomputing gives the same change of the attention update."""
    model, params, images = tiny(heads=1, depth=1)
    maps = vi.measure(model, params, images, ("leave_one_out",))["leave_one_out"]
    captures = vi.capture(model, params, images)
    weights, values = captures.weights[0, 0, 0], captures.values[0, 0, :, 0]
    for i, j in ((0, 3), (5, 5), (12, 1)):
        row = weights[i].at[j].set(0)
        moved = (row / row.sum() @ values - weights[i] @ values) @ captures.out_kernel[0, 0]
        np.testing.assert_allclose(maps[0, 0, i, j], jnp.linalg.norm(moved), rtol=1e-3)


def test_scan_model_and_function_score():
    model, params, images = tiny()
    edges = every_edge(model, layers=(1,))[::29]
    expected = vi.ablate_edges(model, params, images, edges, score=0)
    scanned = ViT(dataclasses.replace(model.config, scan=True))
    found = vi.ablate_edges(scanned, stacked(params), images, edges, score=lambda z: z[:, 0])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_bad_edges_are_named():
    model, params, images = tiny()
    with pytest.raises(ValueError, match=r"edge \[0, 3, 0, 0\] is outside"):
        vi.ablate_edges(model, params, images, np.array([[0, 3, 0, 0]]))
    with pytest.raises(ValueError, match=r"expected int \[E, 4\]"):
        vi.ablate_edges(model, params, images, np.zeros((2, 4)))
    assert vi.ablate_edges(model, params, images, np.zeros((0, 4), int)).shape == (0,)
