"""Weights of Hugging Face's `transformers`: outputs and attention agree, with golden files."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import GOLDENS, golden
from tools import peers
from vit_interact.models.weights import load_checkpoint

NAMES = list(peers.PEERS)
LOGITS, ATTENTION = 1e-4, 1e-5
needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="compares with transformers and PyTorch, which are not installed",
)


@pytest.fixture(scope="module")
def peer():
    """`peers.build`, without the warnings of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        yield peers


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    expected = golden(name)
    own = load_checkpoint(GOLDENS / name)
    assert own.model.config.image_size == (16, 16)
    logits, attention = peers.run_ours(own.model, own.params, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=LOGITS)
    np.testing.assert_allclose(attention, expected["attention"], atol=ATTENTION)

    other = load_checkpoint(GOLDENS / name, image_size=(24, 20))
    logits, attention = peers.run_ours(other.model, other.params, expected["other_images"])
    np.testing.assert_allclose(logits, expected["other_logits"], atol=LOGITS)
    np.testing.assert_allclose(attention[-1, 0], expected["other_attention"], atol=ATTENTION)
    assert any("resized from 4x4 to 6x5" in note for note in other.notes)


@needs_transformers
@pytest.mark.parametrize("name", NAMES)
def test_golden_is_what_the_library_says(name, peer):
    expected = golden(name)
    model = peer.build(name)
    for images, logits in (("images", "logits"), ("other_images", "other_logits")):
        np.testing.assert_allclose(peer.run(name, model, expected[images])[0], expected[logits],
                                   atol=LOGITS)  # fmt: skip


@needs_transformers
@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_registers_swiglu",
                                  "clip_both_towers"])  # fmt: skip
def test_fresh_model_in_shards(name, peer, tmp_path):
    model = peer.build(name, seed=7)
    peer.save(name, model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        ours = load_checkpoint(source)
    images = peer.pictures((16, 16), batch=3, seed=5)
    logits, attention = peer.run_ours(ours.model, ours.params, images)
    expected, maps = peer.run(name, model, images)
    np.testing.assert_allclose(logits, expected, atol=LOGITS)
    np.testing.assert_allclose(attention, maps, atol=ATTENTION)


def test_every_parameter_matters():
    """A golden whose random weights left a parameter without effect would prove nothing of it."""
    for name in ("deit_distilled", "dinov2_registers"):
        expected = golden(name)
        ours = load_checkpoint(GOLDENS / name)
        images = jnp.asarray(expected["images"][:1])

        def loss(params, model=ours.model, images=images):
            return (model.apply({"params": params}, images)[0] ** 3).sum()

        gradients = jax.jit(jax.grad(loss))(ours.params)
        for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
            # A key bias adds the same to every logit of a row, which the softmax takes away.
            if "['key']['bias']" not in jax.tree_util.keystr(path):
                assert np.abs(gradient).max() > 1e-5, jax.tree_util.keystr(path)


def test_what_came_with_the_weights():
    vit = load_checkpoint(GOLDENS / "vit")
    assert vit.class_names == ("ant", "bee", "cat")
    assert vit.model.config.norm_eps == 1e-12 and vit.model.config.activation == "gelu"
    assert vit.preprocess.mean == (0.5,) * 3 and vit.preprocess.std == (0.4,) * 3
    assert vit.preprocess.interpolation == "bilinear" and vit.preprocess.crop == "stretch"
    assert vit.preprocess.size == (16, 16)

    dinov2 = load_checkpoint(GOLDENS / "dinov2")
    assert dinov2.model.config.pool == "cls_gap"
    assert dinov2.preprocess.crop == "resize_then_center" and dinov2.preprocess.crop_pct == 0.75
    assert any("pass image_size=12 to follow it" in note for note in dinov2.notes)
    assert any("not used here: dinov2.embeddings.mask_token" in note for note in dinov2.notes)

    clip = load_checkpoint(GOLDENS / "clip_both_towers")
    assert clip.model.config.activation == "gelu_quick" and clip.model.config.norm_eps == 1e-5
    assert clip.preprocess.mean[0] == 0.48145466
    assert any("text_model" in note for note in clip.notes)


def test_without_config_conventions_are_named(tmp_path):
    import shutil

    path = tmp_path / "alone.safetensors"
    shutil.copy(GOLDENS / "vit" / "model.safetensors", path)
    with pytest.raises(ValueError, match=r"how many attention heads .* width 16 .* pass heads="):
        load_checkpoint(path)
    alone = load_checkpoint(path, heads=2)
    text = "\n".join(alone.notes)
    assert "from the caller: heads=2" in text
    assert "from the convention of Hugging Face ViT files: mean=(0.5, 0.5, 0.5)" in text
    assert "norm_eps=1e-12" in text
    assert "the square that fits 17 rows of positions: grid=(4, 4)" in text
    expected = golden("vit")
    logits, _ = peers.run_ours(alone.model, alone.params, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=LOGITS)
