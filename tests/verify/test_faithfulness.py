import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import applied, stacked, tiny
from vit_interact.models.vit import ViT
from vit_interact.verify.edges import (
    EdgeTest,
    choose_edges,
    edge_test,
    rank_agreement,
    reaching_queries,
    spearman,
)
from vit_interact.verify.groups import edge_masks, edge_places, group_test
from vit_interact.verify.sanity import redraw, sanity_test

PER_LAYER = 4


def near_linear(**overrides):
    """Small parameters keep the model near linear, so that first order is nearly the truth."""
    model, params, images = tiny(**overrides)
    return model, jax.tree.map(lambda a: 0.5 * a, params), images


def random_attention(config, batch=3, seed=0):
    tokens = config.layout.num_tokens
    weights = np.random.default_rng(seed).random((config.depth, batch, tokens, tokens))
    return np.asarray(weights, np.float32)


def test_edges_are_stratified_over_layers_and_strength():
    config = tiny()[0].config
    attention = random_attention(config)
    edges, left_out = choose_edges(attention, config, PER_LAYER)
    assert edges.shape == (3 * 3 * PER_LAYER, 4)
    assert (edges[:, 2] != edges[:, 3]).all()
    assert left_out == 3 * 12  # in the last layer the class token's query alone counts
    per_place = edges.reshape(3, 3, PER_LAYER, 4)
    for image in range(3):
        for layer in range(3):
            own = per_place[image, layer]
            assert (own[:, 0] == image).all() and (own[:, 1] == layer).all()
            weights = attention[layer, image]
            queries = [0] if layer == 2 else range(13)
            candidates = sorted(weights[i, j] for i in queries for j in range(13) if i != j)
            place = np.searchsorted(candidates, weights[own[:, 2], own[:, 3]])
            assert (place * PER_LAYER // len(candidates)).tolist() == [0, 1, 2, 3]
    assert (per_place[:, 2, :, 2] == 0).all()


def test_edges_depend_on_seed_and_key_and_not_on_the_batch():
    config = tiny()[0].config
    attention = random_attention(config)
    edges, _ = choose_edges(attention, config, PER_LAYER, seed=3, image_keys=[7, 8, 9])
    again, _ = choose_edges(attention[:, 2:], config, PER_LAYER, seed=3, image_keys=[9])
    own = edges[edges[:, 0] == 2][:, 1:]
    np.testing.assert_array_equal(again[:, 1:], own)
    for options in (dict(seed=4, image_keys=[9]), dict(seed=3, image_keys=[10])):
        other, _ = choose_edges(attention[:, 2:], config, PER_LAYER, **options)
        assert (other[:, 1:] != own).any()


@pytest.mark.parametrize(
    ("overrides", "last"),
    [
        (dict(), [0]),
        (dict(distilled=True, registers=1, pos_prefix=2), [0, 1]),
        (dict(pool="gap"), range(1, 13)),
        (dict(pool="cls_gap", registers=1), [0, *range(2, 14)]),
        (dict(pool="map"), range(13)),
    ],
)
def test_reaching_queries_are_those_with_an_effect(overrides, last):
    model, params, images = tiny(**overrides)
    reaching = reaching_queries(model.config)
    assert reaching[:-1].all() and np.flatnonzero(reaching[-1]).tolist() == list(last)
    tokens = model.config.layout.num_tokens
    edges = np.array([[0, 2, i, (i + 1) % tokens] for i in range(tokens)])
    change = vi.ablate_edges(model, params, images, edges)
    # The two runs round differently, but no more than that.
    np.testing.assert_array_equal(np.abs(change) > 1e-12, reaching[-1])


def test_bad_choices_are_named():
    config = tiny()[0].config
    attention = random_attention(config)
    with pytest.raises(ValueError, match="a layer has 12 edges"):
        choose_edges(attention, config, per_layer=13)
    with pytest.raises(ValueError, match="attention is"):
        choose_edges(attention[:2], config)
    with pytest.raises(ValueError, match="expected one for each of 3"):
        choose_edges(attention, config, image_keys=[1])


def test_edge_ranks_cut_edges():
    model, params, images = near_linear(batch=3)
    test = edge_test(model, params, images, ("edge", "attention"), PER_LAYER, batch_size=2)
    assert test.change.dtype == np.float64 and test.values["edge"].dtype == np.float32
    assert len(test.edges) == 3 * 3 * PER_LAYER and test.left_out == 3 * 12
    # Batches, the padded last one too, are a matter of memory alone.
    classes = np.asarray(applied(model, params, images)).argmax(-1)
    np.testing.assert_array_equal(test.score, classes)
    truth = vi.ablate_edges(model, params, images, test.edges, classes)
    np.testing.assert_allclose(test.change, truth, atol=1e-12)
    image, layer, i, j = test.edges.T
    maps = np.asarray(vi.measure(model, params, images, ("edge",))["edge"])
    np.testing.assert_allclose(test.values["edge"], maps[layer, image, i, j], rtol=1e-3, atol=1e-7)

    found = rank_agreement(test, "edge", resamples=200)
    assert found["pooled"] > 0.95 and found["within"] > 0.9
    low, high = found["bootstrap"]
    assert 0.9 < low <= found["pooled"] <= high <= 1
    with pytest.raises(ValueError, match="rollout"):
        rank_agreement(test, "rollout")


def test_a_score_is_handed_on():
    model, params, images = near_linear(batch=3)
    one = edge_test(model, params, images, ("edge",), 2, batch_size=2, score=np.array([2, 0, 1]))
    other = edge_test(model, params, images, ("edge",), 2, batch_size=3, score=lambda z: z[:, 0])
    np.testing.assert_array_equal(one.score, [2, 0, 1])
    np.testing.assert_array_equal(one.edges, other.edges)
    same = one.edges[:, 0] == 1
    np.testing.assert_allclose(one.change[same], other.change[same], atol=1e-12)
    assert callable(other.score)
    assert np.abs(one.change - other.change)[~same].max() > 1e-6


def test_spearman_by_hand():
    def rho(a, b):
        return spearman(np.array(a, float), np.array(b, float))

    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
    assert rho([10, 20, 20, 30], [1, 3, 2, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rho([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert rho([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(rho([1, 1, 1], [1, 2, 3]))
    assert np.isnan(rho([1], [2])) and np.isnan(rho([1, np.nan], [1, 2]))


def test_agreement_inside_layers_and_of_one_image():
    """Each layer alone is ranked rightly, and both together wrongly; a flat layer has no rho."""
    edges = np.array([[0, layer, 0, j] for layer in range(3) for j in (1, 2)])
    change = np.array([1, -2, 11, 12, 5, 6.0])
    values = {"made": np.array([11, 12, 1, 2, 4, 4], np.float32)}
    found = rank_agreement(EdgeTest(edges, change, values, 0, "predicted"), "made")
    assert found["within"] == pytest.approx(1) and found["pooled"] < 0
    assert np.isnan(found["bootstrap"]).all()


def test_masks_have_exactly_the_share_and_the_right_edges():
    layout = tiny()[0].config.layout
    values = jnp.asarray(np.random.default_rng(0).random((3, 2, 12, 12)), jnp.float32)
    values = values.at[2].set(0)  # all equal: some edges have to go all the same
    keys = jnp.arange(2, dtype=jnp.uint32)
    for factor in (-1.0, 1.0, 0.0):
        places = edge_places(values, keys, 0, factor)
        for count in (0, 1, 13, 132):
            masks = np.stack(edge_masks(places, count, layout))
            assert ((~masks).sum(axis=(-2, -1)) == count).all()
            assert masks[..., 0, :].all() and masks[..., :, 0].all()
            assert np.diagonal(masks, axis1=-2, axis2=-1).all()
    cut = ~np.stack(edge_masks(edge_places(values, keys, 0, -1.0), 13, layout))[:2, :, 1:, 1:]
    others = np.asarray(values[:2])[~cut & ~np.eye(12, dtype=bool)].reshape(2, 2, -1)
    assert np.asarray(values[:2])[cut].reshape(2, 2, 13).min() >= 0.85
    assert others.max() <= np.asarray(values[:2])[cut].max()
    for image in range(2):
        own = np.asarray(values[0, image])
        assert own[cut[0, image]].min() > own[~cut[0, image] & ~np.eye(12, dtype=bool)].max()
    # Random edges differ between images and layers, and depend on the image's key alone.
    random = np.asarray(edge_places(values, keys, 0, 0.0))
    assert (random[0, 0] != random[0, 1]).any() and (random[0, 0] != random[1, 0]).any()
    alone = np.asarray(edge_places(values[:, 1:], keys[1:], 0, 0.0))
    np.testing.assert_array_equal(alone[:, 0], random[:, 1])


@pytest.mark.parametrize("scan", [False, True])
def test_group_test_is_the_model_with_that_mask(scan):
    model, params, images = tiny()
    edges = {(4, 7), (1, 2), (12, 3)}
    maps = np.zeros((3, 2, 13, 13), np.float32)
    mask = np.ones((13, 13), bool)
    for i, j in edges:
        maps[:, :, i, j] = 1 + i
        mask[i, j] = False
    maps[:, :, 0, :] = maps[:, :, :, 0] = 99  # prefix tokens are never cut, nor are self edges
    maps[:, :, range(13), range(13)] = 99
    share = 3 / 132
    base = np.asarray(applied(model, params, images))
    masked = np.asarray(applied(model, params, images, mask=[jnp.asarray(mask)] * 3))
    if scan:
        model, params = ViT(dataclasses.replace(model.config, scan=True)), stacked(params)
    found = group_test(model, params, images, maps, shares=(0.0, share, 1.0))
    rows, classes = np.arange(2), base.argmax(-1)
    np.testing.assert_array_equal(found.unmasked, classes)
    expected = (masked - base)[rows, classes]
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(found.change["top", share], expected, atol=1e-5)
    np.testing.assert_array_equal(found.predictions["top", share], masked.argmax(-1))
    for kind in ("top", "bottom", "random"):
        np.testing.assert_array_equal(found.change[kind, 0.0], 0)
        # All edges are all edges, whatever their order.
        np.testing.assert_array_equal(found.change[kind, 1.0], found.change["top", 1.0])
    assert (found.change["bottom", share] != found.change["top", share]).all()


def test_group_test_compiles_once():
    from vit_interact.verify import groups

    model, params, images = tiny(depth=2)
    maps = vi.measure(model, params, images, ("attention",))["attention"]
    before = groups._run_masked._cache_size()
    group_test(model, params, images, maps)
    assert groups._run_masked._cache_size() == before + 1


def test_bad_groups_are_named():
    model, params, images = tiny()
    maps = np.zeros((3, 2, 13, 13), np.float32)
    with pytest.raises(ValueError, match="best"):
        group_test(model, params, images, maps, which=("best",))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        group_test(model, params, images, maps, shares=(1.5,))
    with pytest.raises(ValueError, match=r"expected \(3, 2, 13, 13\)"):
        group_test(model, params, images, maps[:2])


def test_sanity_notices_fresh_weights():
    model, params, images = near_linear(batch=3)
    names = ("edge", "attention")
    test = edge_test(model, params, images, names, PER_LAYER, batch_size=2)
    found = sanity_test(model, params, images, test, names, batch_size=2)
    assert list(found) == [0, 1, 2, 3]
    for name in names:
        assert found[0][name]["original"] == pytest.approx(1, abs=1e-3)
        pooled = rank_agreement(test, name, resamples=2)["pooled"]
        assert found[0][name]["truth"] == pytest.approx(pooled, abs=1e-2)
        assert found[3][name]["original"] < 0.95
    assert found[3]["edge"]["truth"] < found[0]["edge"]["truth"] - 0.1
    # Attention is formed below what was redrawn, except in the redrawn layers themselves.
    assert found[3]["attention"]["original"] < found[1]["attention"]["original"]


def test_redraw_goes_from_the_top():
    _, params, _ = tiny()
    fresh = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)

    def same(count):
        new = redraw(params, fresh, count, 3)
        flags = jax.tree.map(np.array_equal, new, params)
        inner = flags.pop("Transformer")
        return {k for k, v in {**flags, **inner}.items() if all(jax.tree.leaves(v))}

    everything = {"embedding", "pos_embedding", "cls", "head", "encoder_norm"}
    everything |= {f"encoderblock_{n}" for n in range(3)}
    assert same(0) == everything
    assert same(1) == everything - {"head", "encoder_norm", "encoderblock_2"}
    assert same(3) == {"embedding", "pos_embedding", "cls"}


def test_scanned_models_are_refused():
    model, params, images = tiny()
    test = EdgeTest(np.array([[0, 0, 0, 1]]), np.zeros(1), {"edge": np.zeros(1)}, 0, "predicted")
    scanned = ViT(dataclasses.replace(model.config, scan=True))
    with pytest.raises(ValueError, match="scan=False"):
        sanity_test(scanned, stacked(params), images, test, ("edge",))
    with pytest.raises(ValueError, match="gradient"):
        sanity_test(model, params, images, test, ("gradient",))
