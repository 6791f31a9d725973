"""The embedded model on embedded photographs: real weights, real numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import applied
from vit_interact import interactions as vx
from vit_interact.models.attention import Taps
from vit_interact.models.vit import ViT


@pytest.fixture(scope="module")
def embedded():
    checkpoint = vi.load_checkpoint("vit_s14_caltech101")
    return checkpoint, checkpoint.load_images(sample.path for sample in vi.sample_images(2))


def test_predicts_its_photographs(embedded):
    checkpoint, images = embedded
    logits = applied(checkpoint.model, checkpoint.params, images)
    labels = [sample.label for sample in vi.sample_images(2)]
    assert [checkpoint.class_names[i] for i in np.argmax(logits, -1)] == labels


@pytest.fixture(scope="module")
def exact(embedded):
    """Captures of the first two layers of one photograph, computed in float64."""
    checkpoint, images = embedded
    with jax.enable_x64(True):
        model = ViT(dataclasses.replace(checkpoint.model.config, dtype="float64"), taps=Taps())
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), checkpoint.params)
        captures = vi.capture(model, params, jnp.asarray(images[:1], jnp.float64), layers=(0, 1))
        return vx.Captures(*(np.asarray(tensor) for tensor in captures))


def changes(captures, layer, head):
    """Change of the head's output when each edge is cut, `[N, N, K]`, in float64."""
    weights = captures.weights[layer, 0, head][..., None]
    values = captures.values[layer, 0, :, head]
    output = captures.output[layer, 0, :, head][:, None]
    return (output - weights * values[None]) / (1 - weights) - output


@pytest.mark.parametrize("layer", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_first_layers_against_float64(exact, layer):
    """Their weights reach 1.0000, where the plain formula is wrong by a factor in float32."""
    heads = exact.weights.shape[2]
    assert exact.weights.max() > 0.999
    squared = total = 0
    for head in range(heads):
        change = changes(exact, layer, head)
        kernel = exact.out_kernel[layer, head]
        squared = squared + np.einsum("ijk,kl,ijl->ij", change, kernel @ kernel.T, change)
        total = total + np.einsum("ik,ijk->ij", exact.output_grad[layer, 0, :, head], change)
    narrow = [jnp.asarray(tensor[layer : layer + 1], jnp.float32) for tensor in exact]
    found = {name: vx.compute(name, vx.Captures(*narrow)) for name in ("leave_one_out", "edge")}
    for name, expected in (("leave_one_out", np.sqrt(squared)), ("edge", np.abs(total))):
        error = np.abs(np.asarray(found[name][0, 0]) - expected)
        assert error.max() < 1e-4 * expected.max(), name
    halves = [tensor.astype(jnp.bfloat16) for tensor in narrow]
    rough = vx.Captures(narrow[0], *halves[1:])
    for name, expected in (("leave_one_out", np.sqrt(squared)), ("edge", np.abs(total))):
        error = np.abs(np.asarray(vx.compute(name, rough)[0, 0]) - expected)
        assert error.max() < 0.02 * expected.max(), name


@pytest.mark.slow
def test_edge_against_really_cut_edges(embedded):
    """Random edges of four layers, patches on patches; METHOD reports rho >= 0.998."""
    checkpoint, images = embedded
    rng = np.random.default_rng(0)
    count = 48
    edges = np.stack(
        [
            np.zeros(count, int),
            rng.choice([0, 4, 8, 10], count),
            rng.integers(1, 257, count),
            rng.integers(1, 257, count),
        ],
        axis=1,
    )
    model, params = checkpoint.model, checkpoint.params
    truth = np.abs(vi.ablate_edges(model, params, images[:1], edges, batch_size=16))
    with jax.enable_x64(True):
        model = ViT(dataclasses.replace(checkpoint.model.config, dtype="float64"), taps=Taps())
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), checkpoint.params)
        wide = jnp.asarray(images[:1], jnp.float64)
        maps = np.asarray(vi.measure(model, params, wide, ("edge",))["edge"])
    found = maps[edges[:, 1], 0, edges[:, 2], edges[:, 3]]

    def rank(x):
        return np.argsort(np.argsort(x))

    assert np.corrcoef(rank(found), rank(truth))[0, 1] > 0.99
