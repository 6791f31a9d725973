"""Windows and removal as functions of arrays, and curves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import tiny
from vit_interact import interactions as vx
from vit_interact.verify import curves, removal, windows
from vit_interact.verify.subject import Subject

# As programs; op by op, each operation of a new shape would be one.
make_windows = jax.jit(windows.make_windows, static_argnums=(1, 2))
apply_windows = jax.jit(windows.apply_windows, static_argnums=0)
apply_mask = jax.jit(removal.apply_mask, static_argnums=0)


@jax.jit
def keys(numbers):
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(numbers)


@pytest.fixture(scope="module")
def setting():
    model, params, images = tiny(batch=3)
    maps = vi.measure(model, params, images, ("attention", "edge"))
    subject = Subject.of(model)
    compiled = {name: jax.jit(getattr(subject, name)) for name in ("apply", "drop")}
    return dataclasses.replace(subject, **compiled), params, images, maps


def test_windows_of_the_whole_grid_change_nothing(setting):
    subject, params, images, maps = setting
    made = make_windows(maps["attention"], subject.layout, (0.5, 1.0), keys(jnp.array([0, 1, 2])))
    boxes = made["layers", "indicator"]
    assert boxes.shape == (2, 3, 3, subject.layout.num_patches, 4)
    logits, area = apply_windows(subject, params, images, boxes[1])
    np.testing.assert_allclose(area, 1.0)
    np.testing.assert_allclose(logits, subject.apply(params, images, None), atol=1e-5)
    small, area = apply_windows(subject, params, images, boxes[0])
    assert (np.asarray(area) < 0.7).all()
    assert np.abs(small - logits).max() > 1e-3


def test_windows_are_those_of_the_definitions(setting):
    subject, _, _, maps = setting
    made = make_windows(maps["edge"], subject.layout, (0.7,), keys(jnp.array([0, 1, 2])))
    assert {kind for variant, kind in made if variant == "layers"} == {
        "indicator", *windows.CONTROLS,
    }  # fmt: skip
    rows = vx.patch_view(maps["edge"], subject.layout)
    own = vx.smallest_windows(rows, subject.layout, 0.7)
    np.testing.assert_array_equal(made["layers", "indicator"][0], own)
    shared = np.asarray(made["shared", "indicator"][0])
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1], shared.shape))


def test_stages_by_hand():
    assert windows.STAGE == 0.8
    assert windows.stages_of(1.0) == (0, 1.0)
    assert windows.stages_of(0.9) == (0, 0.9)
    assert windows.stages_of(0.8) == (0, 0.8)
    whole, rest = windows.stages_of(0.75)  # 0.8 of 0.9375
    assert whole == 1 and math.isclose(rest, 0.9375)
    whole, rest = windows.stages_of(0.8**3)
    assert whole == 2 and math.isclose(rest, 0.8)


@pytest.mark.parametrize("name", ["gradient", pytest.param("attention", marks=pytest.mark.slow)])
def test_staged_windows_are_measured_again_inside(setting, name):
    """One stage after the other, by hand, outside of `scan` and without sharing a search."""
    subject, params, images, _ = setting
    model, layout, coverages = tiny()[0], subject.layout, (0.9, 0.5)
    made = windows.staged_windows(subject, params, images, name, coverages)
    classes = subject.apply(params, images, None).argmax(-1)
    for coverage, found in zip(coverages, made, strict=True):
        whole, rest = windows.stages_of(coverage)
        assert whole == (0 if coverage == 0.9 else 3)
        inside = np.tile(np.array([0, 0, 3, 4]), (*found.shape[:-1], 1))
        for share in (*[0.8] * whole, rest):
            mask = [vx.window_mask(layer, layout) for layer in inside]
            maps = vi.measure(model, params, images, (name,), score=classes, mask=mask)[name]
            boxes = vx.smallest_windows(vx.patch_view(maps, layout), layout, share)
            assert (boxes[..., :2] >= inside[..., :2]).all()  # windows only shrink
            assert (boxes[..., 2:] <= inside[..., 2:]).all()
            inside = boxes
        np.testing.assert_array_equal(found, inside)


def test_area_leaves_out_layers_that_cannot_matter(setting):
    subject, params, images, _ = setting
    assert subject.reaching == (0, 1)  # of three layers; the class token alone reads the last
    boxes = np.tile(np.array([0, 0, 3, 4], np.int32), (3, 3, 12, 1))
    last = boxes.copy()
    last[2] = np.stack([*np.divmod(np.arange(12), 4), *np.divmod(np.arange(12), 4)], -1)
    last[2, ..., 2:] += 1  # 1x1 boxes in the last layer
    (whole, _), (logits, area) = (
        apply_windows(subject, params, images, jnp.asarray(one)) for one in (boxes, last)
    )
    np.testing.assert_allclose(area, 1.0)
    np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_flops_of_a_window_aware_kernel():
    layout = vi.TokenLayout(4, 4, 1)
    assert windows.attention_flops_share(1.0, layout) == 1
    assert windows.attention_flops_share(1 / 16, layout) == (16 + 33) / 17**2


def test_deleting_equals_hiding_for_a_class_token(setting):
    subject, params, images, maps = setting
    order = removal.indicator_orders(maps["edge"], subject.layout)["lowest"]
    for share in (0.1, 0.5, 0.9):
        count = removal.patches_left(share, subject.layout)
        dropped = subject.drop(params, images, removal.kept_patches(order, count))
        hidden = removal.hidden_patches(order, count)
        assert (np.asarray(hidden).sum(-1) == 12 - count).all()
        masked = apply_mask(subject, params, images, hidden)
        np.testing.assert_allclose(dropped, masked, atol=1e-5)


def test_deleting_shortens_the_sequence(setting):
    subject, params, images, _ = setting

    def flops(count):
        keep = jnp.tile(jnp.arange(count), (3, 1))
        return subject.drop.lower(params, images, keep).compile().cost_analysis()["flops"]

    assert flops(3) < 0.5 * flops(12)


def test_grey_pixels(setting):
    subject, params, images, _ = setting
    hidden = np.zeros((3, 12), bool)
    hidden[:, 5] = True  # row 1, column 1 of 3x4 patches of 4 pixels
    grey = np.array(images)  # a copy that can be written
    grey[:, 4:8, 4:8] = 0
    made = removal.apply_zero(subject, params, images, jnp.asarray(hidden))
    np.testing.assert_allclose(made, subject.apply(params, jnp.asarray(grey), None), atol=1e-6)


def test_orders(setting):
    subject, _, _, maps = setting
    layout = subject.layout
    made = removal.indicator_orders(maps["edge"], layout)
    impact = vx.received_impact(vx.combine_layers(maps["edge"], layout), layout)
    np.testing.assert_array_equal(made["lowest"], np.argsort(impact, axis=-1, kind="stable"))
    np.testing.assert_array_equal(made["highest"], np.argsort(-impact, axis=-1, kind="stable"))
    controls = removal.control_orders(maps["attention"], subject, keys(jnp.array([4, 5, 6])))
    alone = removal.control_orders(maps["attention"][:, 1:2], subject, keys(jnp.array([5])))
    for name, order in controls.items():
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(12), (3, 1)))
        np.testing.assert_array_equal(order[1:2], alone[name])  # whatever the batch
    assert not np.array_equal(controls["random0"], controls["random1"])
    last = np.asarray(maps["attention"])[-1, :, 0, 1:]
    np.testing.assert_array_equal(controls["class_attention_last"][:, 0], last.argmin(-1))


@pytest.mark.parametrize("share", removal.SHARES)
def test_patches_left(share):
    layout = vi.TokenLayout(16, 16, 1)
    assert removal.patches_left(share, layout) == 256 - math.floor(round(share * 10) * 256 / 10)


def test_curves_by_hand():
    correct = np.array([[1, 1], [1, 0], [0, 0]], bool)
    weights = np.array([[0.5, 0.5], [1, 0], [0, 1]])
    auc, (low, high) = curves.removal_auc([0.0, 0.5, 1.0], correct, weights)
    assert auc == 0.5
    assert 0.25 <= low <= 0.27 and 0.73 <= high <= 0.75
    weights = curves.resample(50, seed=1)
    np.testing.assert_allclose(weights.sum(1), 1)
    top1, (low, high) = curves.share(np.arange(50) < 40, weights)
    assert top1 == 0.8 and 0.66 < low < 0.72 and 0.88 < high < 0.92


def test_staged_order_by_hand():
    """Impacts that depend on what is there: 8 patches, measured at 8, 4, 2 and 1."""
    assert removal.stage_sizes(8) == [8, 4, 2, 1]
    assert removal.stage_sizes(256) == [256, 153, 91, 54, 32]
    seen = []
    tables = {
        8: [7, 6, 5, 4, 3, 2, 1, 0],  # 7, 6, 5, 4 go first
        4: [0, 9, 8, 1],  # of 0 1 2 3: then 0 and 3
        2: [5, 4],  # of 1 2: then 2
        1: [0],
    }

    def impact(keep):
        seen.append(keep.tolist())
        return jnp.asarray([tables[keep.shape[1]]], jnp.float32)

    order = removal.staged_order(impact, 1, 8)
    assert seen == [[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3]], [[1, 2]], [[1]]]
    assert order.tolist() == [[7, 6, 5, 4, 0, 3, 2, 1]]


@pytest.mark.parametrize(
    "name",
    [
        "gradient",
        pytest.param("attention", marks=pytest.mark.slow),
        pytest.param("rollout", marks=pytest.mark.slow),
    ],
)
def test_staged_order_measures_what_is_left(setting, name):
    subject, params, images, _ = setting
    order = np.asarray(removal.staged_by_indicator(subject, params, images, name))
    assert (np.sort(order, axis=1) == np.arange(subject.layout.num_patches)).all()
    # The last measurement, by hand: what it sees comes last, in the order of its impact.
    sizes = removal.stage_sizes(subject.layout.num_patches)
    keep = np.sort(order[:, -sizes[-1] :], axis=1)
    classes = subject.apply(params, images, None).argmax(-1)
    maps = subject.measure_kept(params, images, (name,), jnp.asarray(keep), classes)[name]
    layout = vi.TokenLayout(1, sizes[-1], subject.layout.prefix)
    mean = maps[-1] if name == "rollout" else vx.combine_layers(maps, layout)
    impact = np.asarray(vx.received_impact(mean, layout, include_prefix=False))
    np.testing.assert_array_equal(
        order[:, -sizes[-1] :], np.take_along_axis(keep, np.argsort(impact, axis=1), axis=1)
    )


def test_staged_class_attention_is_a_permutation(setting):
    subject, params, images, _ = setting
    order = np.asarray(removal.staged_by_class_attention(subject, params, images))
    assert (np.sort(order, axis=1) == np.arange(subject.layout.num_patches)).all()
