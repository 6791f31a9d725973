import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_interact.data.preprocess import Preprocess
from vit_interact.data.samples import sample_images, sample_weights


def striped(width, height):
    """Column number in red, row number in green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("crop", ["center_then_resize", "resize_then_center"])
def test_centre_of_a_wide_image(crop):
    picture = Preprocess(size=(20, 20), crop=crop).picture(striped(100, 20))
    np.testing.assert_array_equal(picture[0, :, 0], np.arange(40, 60))
    np.testing.assert_array_equal(picture[:, 0, 1], np.arange(20))


def test_crop_keeps_the_aspect_of_a_target_that_is_not_square():
    picture = Preprocess(size=(40, 20), crop="center_then_resize").picture(striped(100, 80))
    assert picture.shape == (40, 20, 3)
    # 80 x 40 pixels around the centre, halved.
    np.testing.assert_allclose(picture[20, :, 0], np.arange(30.5, 70, 2), atol=1)


def test_stretch_keeps_every_corner():
    picture = Preprocess(size=(8, 8), crop="stretch", interpolation="nearest").picture(
        striped(80, 16)
    )
    np.testing.assert_array_equal(picture[0, :, 0], np.arange(5, 80, 10))


def test_crop_pct_matches_timm():
    """timm: the shorter side to floor(size / crop_pct), then the centre."""
    picture = Preprocess(size=(16, 16), crop="resize_then_center", crop_pct=0.8).picture(
        striped(20, 20)
    )
    np.testing.assert_array_equal(picture[0, :, 0], np.arange(2, 18))


@pytest.mark.parametrize("size", [(1, 1), (2, 400), (400, 2)])
def test_tiny_and_elongated_images(size):
    for crop in ("center_then_resize", "resize_then_center", "stretch"):
        assert Preprocess(size=(14, 28), crop=crop).picture(Image.new("RGB", size)).shape == (
            14,
            28,
            3,
        )


def test_strips_take_no_more_memory_than_their_crop():
    """Resized whole, this one would have 12 gigapixels."""
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 255, (500_000, 2, 3), np.uint8))
    preprocess = Preprocess(size=(224, 224))
    centre = strip.crop((0, 249_990, 2, 250_010))
    difference = preprocess.picture(strip).astype(int) - preprocess.picture(centre)
    assert np.abs(difference).max() <= 2  # half of a resized pixel apart, of 112 a pixel


def test_normalize_in_numpy_and_jax():
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    expected = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    found = preprocess.normalize(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(preprocess.normalize(jnp.asarray(pixels)), expected, atol=1e-6)


def test_round_trip_through_json():
    preprocess = Preprocess(size=(32, 48), interpolation="bilinear", crop="stretch")
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert "32x48, bilinear" in preprocess.describe()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "middle"}, "expected one of"),
        ({"interpolation": "cubic"}, "expected one of"),
        ({"crop_pct": 0.0}, "share in"),
        ({"std": (1.0, 0.0, 1.0)}, "must be positive"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**fields)


def test_samples_are_two_of_each_class():
    samples = sample_images()
    assert len(samples) == 202
    assert len({sample.label for sample in samples}) == 101
    assert samples == sorted(samples, key=lambda s: s.path)
    assert len({sample.label for sample in sample_images(limit=8)}) == 8
    assert sample_weights().stat().st_size > 40e6
    with pytest.raises(ValueError, match="at least 1"):
        sample_images(limit=0)


def test_samples_are_the_choice_of_the_script(development_data, tmp_path):
    from tools.embed_samples import main

    main(development_data / "caltech101" / "test", tmp_path)
    chosen = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.glob("*/*.jpg")}
    root = sample_images()[0].path.parents[1]
    assert chosen == {s.path.relative_to(root): s.path.read_bytes() for s in sample_images()}
