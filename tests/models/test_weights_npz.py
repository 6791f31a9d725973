"""Google's npz files against an independent NumPy model."""

import ml_dtypes
import numpy as np
import pytest

from tests.models import flax_names
from tests.models.helpers import applied
from vit_interact.models.posembed import sincos_position_embedding
from vit_interact.models.weights import WeightsError, load_checkpoint

OLD_NAMES = {
    "pos_embedding": "Transformer/posembed_input/pos_embedding",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


@pytest.fixture
def images():
    return np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype(np.float32)


def save(path, flat):
    np.savez(path, **flat)
    return path


def check(checkpoint, params, images, **settings):
    logits = applied(checkpoint.model, checkpoint.params, as_jax(images))
    expected = [flax_names.forward(params, image, **settings) for image in images]
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def as_jax(images):
    import jax.numpy as jnp

    return jnp.asarray(images)


def test_augreg_with_the_old_names(tmp_path, images):
    params = flax_names.random_params(np.random.default_rng(0), rows=17)
    flat = flax_names.flatten(params)
    for new, old in OLD_NAMES.items():
        flat = {name.replace(new, old): array for name, array in flat.items()}
    assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel" in flat
    loaded = load_checkpoint(save(tmp_path / "augreg.npz", flat))
    config = loaded.model.config
    assert (config.heads, config.pool, config.pos_prefix) == (2, "cls", 1)
    assert config.activation == "gelu_tanh" and config.norm_eps == 1e-6
    assert loaded.preprocess.mean == (0.5, 0.5, 0.5) and loaded.preprocess.crop == "stretch"
    assert any("the convention of augreg files" in note for note in loaded.notes)
    check(loaded, params, images, pool="cls", cls_position=True)


def test_augreg_at_another_size_is_scipys_zoom(tmp_path):
    ndimage = pytest.importorskip("scipy.ndimage")
    params = flax_names.random_params(np.random.default_rng(0), rows=17)
    flat = flax_names.flatten(params)
    flat["Transformer/posembed_input/pos_embedding"] = flat.pop("pos_embedding")
    loaded = load_checkpoint(save(tmp_path / "augreg.npz", flat), image_size=(24, 12))
    pos = params["pos_embedding"][0]
    zoomed = ndimage.zoom(pos[1:].reshape(4, 4, -1), (6 / 4, 3 / 4, 1), order=1)
    params["pos_embedding"] = np.concatenate([pos[:1], zoomed.reshape(18, -1)])[None]
    images = np.random.default_rng(3).normal(size=(1, 24, 12, 3)).astype(np.float32)
    check(loaded, params, images, pool="cls", cls_position=True)


@pytest.mark.parametrize("pool,cls,prefix", [("gap", False, ""), ("map", False, "params/"),
                                             ("cls", True, "opt/params/"),
                                             ("map", False, "params/img/")])  # fmt: skip
def test_big_vision(tmp_path, images, pool, cls, prefix):
    params = flax_names.random_params(np.random.default_rng(1), cls=cls, map_head=pool == "map")
    flat = {f"{prefix}{name}": array for name, array in flax_names.flatten(params).items()}
    flat |= {"opt/0/mu/head/bias": np.ones(3), "params/txt/head/bias": np.ones(3)}
    loaded = load_checkpoint(save(tmp_path / "bv.npz", flat))
    assert (loaded.model.config.pool, loaded.model.config.pos_prefix) == (pool, 0)
    assert any("the convention of big_vision files" in note for note in loaded.notes)
    assert any("opt/0/mu/head/bias" in note for note in loaded.notes)
    check(loaded, params, images, pool=pool)


def test_big_vision_scanned_and_bfloat16(tmp_path, images):
    params = flax_names.random_params(np.random.default_rng(2), cls=False)
    params = flatten_bfloat16(params)
    encoder = params["Transformer"]
    stacked = {"Transformer": {"encoder_norm": encoder["encoder_norm"], "encoderblock": stack(
        encoder["encoderblock_0"], encoder["encoderblock_1"])}}  # fmt: skip
    flat = flax_names.flatten({**params, **stacked})
    flat = {name: array.astype(ml_dtypes.bfloat16).view("V2") for name, array in flat.items()}
    path = save(tmp_path / "scan.npz", flat)
    for scan in (False, True):
        loaded = load_checkpoint(path, scan=scan)
        assert loaded.model.config.depth == 2
        assert ("encoderblock" in loaded.params["Transformer"]) == scan
        check(loaded, params, images, pool="gap")


def flatten_bfloat16(tree):
    """The same tree, each number rounded to bfloat16."""
    return {
        key: flatten_bfloat16(value) if isinstance(value, dict)
        else value.astype(ml_dtypes.bfloat16).astype(np.float64)
        for key, value in tree.items()
    }  # fmt: skip


def stack(first, second):
    return {
        key: stack(value, second[key]) if isinstance(value, dict)
        else np.stack([value, second[key]])
        for key, value in first.items()
    }  # fmt: skip


def test_big_vision_without_learned_positions(tmp_path):
    params = flax_names.random_params(np.random.default_rng(4), cls=False, positions=False)
    path = save(tmp_path / "sincos.npz", flax_names.flatten(params))
    images = np.random.default_rng(3).normal(size=(1, 12, 20, 3)).astype(np.float32)
    loaded = load_checkpoint(path, image_size=(12, 20))
    assert any("big_vision's fixed sincos2d for 12x20" in note for note in loaded.notes)
    check(loaded, params, images, pool="gap", positions=sincos_position_embedding((3, 5), 16)[0])
    assert load_checkpoint(path).model.config.image_size == (224, 224)


def test_arch_by_name_takes_the_formats_gelu(tmp_path):
    params = flax_names.random_params(
        np.random.default_rng(5), width=192, heads=3, depth=12, mlp=768, patch=16, rows=5, classes=7
    )
    path = save(tmp_path / "ti.npz", flax_names.flatten(params))
    loaded = load_checkpoint(path, arch="vit_ti16")
    assert loaded.model.config.activation == "gelu_tanh"
    assert loaded.model.config.num_classes == 7 and loaded.model.config.image_size == (32, 32)
    with pytest.raises(WeightsError, match=r"cls_token|cls|width|in the file and .* in the model"):
        load_checkpoint(path, arch="vit_s16")


def test_pre_logits_are_named_and_dropped_when_asked(tmp_path):
    params = flax_names.random_params(np.random.default_rng(0), rows=17)
    params["pre_logits"] = {"kernel": np.ones((16, 16)), "bias": np.ones(16)}
    path = save(tmp_path / "in21k.npz", flax_names.flatten(params))
    with pytest.raises(WeightsError, match=r"2 extra \(pre_logits/bias, pre_logits/kernel\).*drop"):
        load_checkpoint(path)
    assert load_checkpoint(path, drop_head=True).model.config.num_classes == 0


def test_pickled_objects_are_refused(tmp_path):
    params = flax_names.flatten(flax_names.random_params(np.random.default_rng(0), rows=17))
    params["head/bias"] = np.array([{"a": 1}], dtype=object)
    with pytest.raises(WeightsError, match=r"head/bias holds pickled objects.*np\.savez"):
        load_checkpoint(save(tmp_path / "object.npz", params))
