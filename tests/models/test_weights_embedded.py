"""The embedded weights load by name and know what is on photographs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_interact.data.images import read_image
from vit_interact.data.samples import sample_images
from vit_interact.models.weights import load_checkpoint


@pytest.fixture(scope="module")
def embedded():
    return load_checkpoint("vit_s14_caltech101")


def test_everything_comes_from_the_file(embedded):
    config, preprocess = embedded.model.config, embedded.preprocess
    assert (config.width, config.depth, config.heads, config.patch_size) == (384, 12, 6, (14, 14))
    assert config.image_size == (224, 224) and config.num_classes == 101
    assert config.layer_scale is not None and config.activation == "gelu"
    assert preprocess.size == (224, 224) and preprocess.crop == "center_then_resize"
    assert preprocess.mean == (0.485, 0.456, 0.406) and preprocess.interpolation == "bicubic"
    assert len(embedded.class_names) == 101 and "accordion" in embedded.class_names
    assert len(embedded.sha256) == 64


def test_predicts_photographs(embedded):
    samples = sample_images(24)
    pictures = np.stack([embedded.preprocess.picture(read_image(s.path)) for s in samples])
    images = jnp.asarray(embedded.preprocess.normalize(pictures))
    logits = jax.jit(embedded.model.apply)({"params": embedded.params}, images)
    predicted = [embedded.class_names[i] for i in np.asarray(logits.argmax(-1))]
    right = sum(name == sample.label for name, sample in zip(predicted, samples, strict=True))
    assert right >= 20, f"{right} of {len(samples)}"


def test_at_another_size(embedded):
    other = load_checkpoint("vit_s14_caltech101", image_size=(168, 224))
    assert other.preprocess.size == (168, 224)
    assert other.params["pos_embedding"].shape == (1, 1 + 12 * 16, 384)
    assert any("from 16x16 to 12x16 patches (bicubic_antialias)" in note for note in other.notes)
