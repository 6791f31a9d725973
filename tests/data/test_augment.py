"""Augmentation against Pillow, by statistics, and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from vit_interact.data import augment_host
from vit_interact.data.augment import (
    Augment,
    _boxes,
    augment_images,
    erase_images,
    mix_images,
    resampling,
)
from vit_interact.data.operations import NAMES, OPERATIONS, adjust_hue, apply_operation

operate = jax.jit(apply_operation)
PLAIN = Augment(crop=None, flip=False)


def photograph(height=40, width=48, seed=0):
    """Smooth, with colours and a full range of values."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("box", [(0, 0, 48, 40), (5, 3, 41, 33), (10, 8, 22, 18), (0, 1, 48, 3)])
def test_resampling_is_pillows(box):
    image = photograph()
    expected = np.asarray(image.resize((16, 12), Image.Resampling.BILINEAR, box=box), float)
    left, top, right, bottom = (jnp.array([float(side)]) for side in box)
    rows, cols = resampling(top, bottom, 40, 12)[0], resampling(left, right, 48, 16)[0]
    found = np.einsum("ij,jwc,kw->ikc", rows, np.asarray(image, float), cols)
    # Pillow rounds twice, after rows and after columns.
    assert np.abs(found - expected).max() <= 1.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_operations_are_pillows(name, sign):
    image, level = photograph(), 6.0
    expected = np.asarray(augment_host.apply_operation(image, name, level, sign), float)
    batch = jnp.asarray(np.asarray(image), jnp.float32)[None]
    chosen = jnp.array([NAMES.index(name)])
    found = operate(batch, chosen, jnp.array([level]), jnp.array([sign]))[0]
    distance = np.abs(np.asarray(found) - expected).max(axis=-1)
    # Pillow decides in whole steps of 2^-16 what lies outside, so a border pixel may differ.
    assert np.quantile(distance, 0.99) <= 2
    if name not in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert distance.max() <= 2
    if not OPERATIONS[name][2]:
        return
    other = operate(batch, chosen, jnp.array([level]), jnp.array([-sign]))[0]
    assert np.abs(np.asarray(other - found)).mean() > 0.5


def test_each_image_has_its_own_operation_and_none_is_the_identity():
    pictures = np.stack([np.asarray(photograph(seed=seed)) for seed in range(3)])
    batch = jnp.asarray(pictures, jnp.float32)
    chosen = jnp.array([-1, NAMES.index("invert"), NAMES.index("posterize")])
    found = np.asarray(operate(batch, chosen, jnp.full(3, 5.0), jnp.ones(3)))
    np.testing.assert_allclose(found[0], pictures[0], atol=1e-3)
    np.testing.assert_allclose(found[1], 255 - pictures[1].astype(float), atol=1e-3)
    np.testing.assert_allclose(found[2], pictures[2] // 64 * 64, atol=1e-3)


@pytest.mark.parametrize("turns", [-0.4, 0.1, 0.5])
def test_hue_is_pillows(turns):
    image = photograph()
    expected = np.asarray(augment_host.adjust_hue(image, turns), float)
    found = adjust_hue(jnp.asarray(np.asarray(image), jnp.float32)[None], jnp.array([turns]))[0]
    # Pillow keeps hue and saturation in 256 steps.
    assert np.abs(np.asarray(found) - expected).max() < 9
    assert np.abs(np.asarray(found) - expected).mean() < 1.5


def test_the_plain_plan_is_the_identity_on_both_sides():
    image = photograph(32, 32)
    pictures = np.asarray(image)[None]
    sizes = jnp.array([[32, 32]])
    found = augment_images(jax.random.key(0), jnp.asarray(pictures), sizes, PLAIN, (32, 32))
    np.testing.assert_allclose(found, pictures, atol=1e-3)
    host = augment_host.augment_picture(np.random.default_rng(0), image, PLAIN, (32, 32))
    np.testing.assert_array_equal(host, pictures[0])


def test_crops_have_the_aspect_asked_for_in_the_original():
    plan = Augment(crop=(0.2, 0.6), ratio=(0.5, 2.0))
    sizes = jnp.tile(jnp.array([[300, 500]]), (4000, 1))
    top, left, bottom, right = np.asarray(_boxes(jax.random.key(1), sizes, plan)).T
    assert min(top.min(), left.min()) >= 0 and max(bottom.max(), right.max()) <= 1 + 1e-6
    area = (bottom - top) * (right - left)
    assert area.min() > 0.19 and area.max() < 0.61
    ratio = (right - left) * 500 / ((bottom - top) * 300)
    assert ratio.min() > 0.49 and ratio.max() < 2.01
    # Places are uniform: the middle of crops is the middle of the picture.
    assert abs(((top + bottom) / 2).mean() - 0.5) < 0.02
    host = np.array(
        [
            augment_host._box(np.random.default_rng(i), Image.new("RGB", (500, 300)), plan)
            for i in range(2000)
        ]
    )
    host_area = (host[:, 2] - host[:, 0]) * (host[:, 3] - host[:, 1]) / 150_000
    assert abs(host_area.mean() - area.mean()) < 0.01
    host_ratio = (host[:, 2] - host[:, 0]) / (host[:, 3] - host[:, 1])
    assert abs(np.log(host_ratio).mean() - np.log(ratio).mean()) < 0.04


def test_a_strip_in_which_no_crop_fits_is_cut_in_the_middle():
    plan = Augment(crop=(0.9, 1.0))
    box = np.asarray(_boxes(jax.random.key(0), jnp.array([[10, 100]]), plan))[0]
    np.testing.assert_allclose(box, [0, 0.43, 1, 0.56], atol=1e-6)
    host = augment_host._box(np.random.default_rng(0), Image.new("RGB", (100, 10)), plan)
    assert host == (43, 0, 56, 10)


def test_half_of_the_images_are_flipped():
    pictures = jnp.tile(jnp.arange(8, dtype=jnp.uint8)[None, None, :, None], (2000, 8, 1, 3))
    plan = Augment(crop=None)
    sizes = jnp.full((2000, 2), 8)
    found = np.asarray(augment_images(jax.random.key(0), pictures, sizes, plan, (8, 8)))
    flipped = found[:, 0, 0, 0] > 3
    assert 0.46 < flipped.mean() < 0.54
    np.testing.assert_allclose(found[flipped][0, 0, :, 0], np.arange(8)[::-1], atol=1e-4)


@pytest.mark.slow
def test_host_and_device_agree_in_distribution():
    image = photograph(48, 48)
    plan = Augment(
        crop=(0.3, 1.0), rand_augment=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
    )
    count = 600
    pictures = jnp.tile(jnp.asarray(np.asarray(image))[None], (count, 1, 1, 1))
    sizes = jnp.full((count, 2), 48)
    device = np.asarray(augment_images(jax.random.key(2), pictures, sizes, plan, (16, 16)))
    host = np.stack(
        [
            augment_host.augment_picture(np.random.default_rng(i), image, plan, (16, 16))
            for i in range(count)
        ]
    ).astype(float)
    assert device.min() >= 0 and device.max() <= 255
    for of in (np.mean, np.std):
        each = [of(side, axis=(1, 2, 3)) for side in (device, host)]
        # Standard error of a mean over 600 draws.
        error = np.hypot(*(side.std() / np.sqrt(count) for side in each))
        assert abs(each[0].mean() - each[1].mean()) < 4 * error


def test_shifts_bring_in_grey():
    pictures = jnp.full((200, 8, 8, 3), 7, jnp.uint8)
    plan = Augment(crop=None, flip=False, pad=2)
    sizes = jnp.full((200, 2), 8)
    found = np.asarray(augment_images(jax.random.key(0), pictures, sizes, plan, (8, 8)))
    assert set(np.unique(found.round())) == {7.0, 128.0}
    share = (found > 100).mean()
    generator = np.random.default_rng(0)
    dark = Image.new("RGB", (8, 8), (7, 7, 7))
    host = np.stack(
        [augment_host.augment_picture(generator, dark, plan, (8, 8)) for _ in range(200)]
    )
    assert abs(share - (host > 100).mean()) < 0.05


def test_erasing():
    images = jnp.zeros((1000, 16, 16, 3))
    found = np.asarray(erase_images(jax.random.key(0), images, Augment(erase=0.25)))
    touched = (found != 0).any(axis=(1, 2, 3))
    assert 0.2 < touched.mean() < 0.3
    shares = (found[touched] != 0).any(axis=-1).mean(axis=(1, 2))
    assert shares.min() > 0.0 and shares.max() < 0.4
    assert abs(found[found != 0].std() - 1) < 0.05
    assert erase_images(jax.random.key(0), images, Augment()) is images


@pytest.mark.parametrize("plan", [Augment(mixup=0.8), Augment(cutmix=1.0)])
def test_mixing(plan):
    images = jnp.arange(8.0)[:, None, None, None] * jnp.ones((8, 16, 16, 3))
    targets = jax.nn.one_hot(jnp.arange(8), 8)
    mix = jax.jit(lambda key: mix_images(key, images, targets, plan))
    own = []
    for seed in range(60):
        mixed, labels = (np.asarray(x) for x in mix(jax.random.key(seed)))
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
        # What a picture's mean says of its share is what its target says.
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), labels @ np.arange(8), atol=1e-3)
        own.append(labels[0, 0])
    # Beta's mean is a half; a pasted box that is cut off leaves a little more.
    assert 0.35 < np.mean(own) < 0.75
    assert np.std(own) > 0.15
    again = mix(jax.random.key(59))
    np.testing.assert_array_equal(again[0], mixed)


def test_both_kinds_of_mixing_take_turns():
    images = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 8, 8, 3))
    targets = jnp.eye(4)
    plan = Augment(mixup=1.0, cutmix=1.0)
    mix = jax.jit(lambda key: mix_images(key, images, targets, plan)[0])
    blended = [bool(np.asarray(mix(jax.random.key(s)))[0].std() < 1e-6) for s in range(80)]
    assert 20 < sum(blended) < 60


@pytest.mark.slow
def test_a_sharded_batch_is_augmented_as_a_whole_one():
    plan = Augment(rand_augment=1, hue=0.1, brightness=0.2, erase=0.5, mixup=0.5, cutmix=0.5)
    pictures = np.stack([np.asarray(photograph(24, 24, seed=s)) for s in range(8)])
    sizes, targets = np.full((8, 2), 24), np.eye(8, dtype=np.float32)

    @jax.jit
    def run(pictures, sizes, targets):
        images = augment_images(jax.random.key(3), pictures, sizes, plan, (16, 16))
        images = erase_images(jax.random.key(4), images / 255, plan)
        return mix_images(jax.random.key(5), images, targets, plan)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (pictures, sizes, targets)]
    one, eight = run(pictures, sizes, targets), run(*split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), one, eight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": (0.5, 1.2)}, "augment.crop"),
        ({"crop": (0.5, 0.2)}, "augment.crop"),
        ({"ratio": (0.0, 1.0)}, "augment.ratio"),
        ({"pad": 4}, "augment.crop=()"),
        ({"magnitude": 11.0}, "augment.magnitude"),
        ({"hue": 0.7}, "augment.hue"),
        ({"mixup": -1.0}, "augment.mixup"),
    ],
)
def test_impossible_plans_are_refused(settings, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
        Augment(**settings)
    assert "\n" not in str(caught.value)
