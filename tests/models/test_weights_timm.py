"""timm's files: golden models of timm itself, and export and import again."""

import dataclasses
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import GOLDENS, golden
from tools import peers
from vit_interact.data.preprocess import Preprocess
from vit_interact.models.config import ViTConfig, WindowConfig
from vit_interact.models.vit import ViT
from vit_interact.models.weights import (
    export_timm,
    load_checkpoint,
    stack_layers,
    unstack_layers,
)
from vit_interact.models.winft import to_winft

# What no file of a tiny model tells: its heads are not 64 wide.
SETTINGS = {"timm_vit": {}, "timm_clip": {"heads": 2, "activation": "gelu_quick"}}


def load(name, **settings):
    return load_checkpoint(GOLDENS / name, **SETTINGS.get(name, {"heads": 2}), **settings)


def logits(checkpoint, images):
    apply = jax.jit(checkpoint.model.apply)
    return np.asarray(apply({"params": checkpoint.params}, jnp.asarray(images)))


@pytest.mark.parametrize("name", list(peers.TIMM_PEERS))
def test_golden(name):
    expected = golden(name)
    np.testing.assert_allclose(
        logits(load(name), expected["images"]), expected["logits"], atol=1e-5
    )
    other = load(name, image_size=(24, 20))
    np.testing.assert_allclose(
        logits(other, expected["other_images"]), expected["other_logits"], atol=1e-5
    )


@pytest.mark.parametrize("name", list(peers.TIMM_PEERS))
def test_golden_is_what_timm_says(name):
    pytest.importorskip("timm", reason="compares with timm, which is not installed")
    expected = golden(name)
    model = peers.build_timm(name)
    np.testing.assert_allclose(
        peers.run_timm(model, expected["other_images"]), expected["other_logits"], atol=1e-5
    )


def test_what_shapes_tell():
    vit, gated = load("timm_vit").model.config, load("timm_registers").model.config
    assert vit.qk_norm and vit.heads == 2 and vit.pool == "cls"
    assert (gated.registers, gated.pos_prefix, gated.swiglu) == (3, 0, True)
    assert gated.pool == "gap" and not gated.norm_before_pool and gated.layer_scale is not None
    assert any("have no bias: zeros" in note for note in load("timm_registers").notes)
    assert load("timm_map").model.config.pool == "map"
    clip = load("timm_clip").model.config
    assert clip.pre_norm and not clip.patch_bias and clip.norm_eps == 1e-5
    assert load("timm_distilled").preprocess.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", [*peers.TIMM_PEERS, "vit", "deit", "dinov2", "dinov2_registers",
                                  "dinov2_swiglu", "clip_projection"])  # fmt: skip
def test_export_and_import_is_exact(name, tmp_path):
    first = load(name) if name in peers.TIMM_PEERS else load_checkpoint(GOLDENS / name)
    path = tmp_path / "new" / "out.safetensors"
    preprocess = Preprocess(size=(16, 16), crop="stretch", interpolation="lanczos")
    count = first.model.config.num_classes
    names = [f"a|{i}" for i in range(count)] if count else None
    export_timm(first.model, first.params, path, preprocess=preprocess, class_names=names)
    again = load_checkpoint(path)
    assert again.model.config == first.model.config
    assert again.preprocess == preprocess
    assert again.class_names == (tuple(names) if names else None)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert list(path.parent.iterdir()) == [path]


def test_exported_names_are_those_of_timm(tmp_path):
    """The file that timm wrote and ours of the same model hold the same names and numbers."""
    from safetensors.numpy import load_file

    for name in ("timm_vit", "timm_map", "timm_clip", "timm_distilled"):
        path = tmp_path / f"{name}.safetensors"
        loaded = load(name)
        export_timm(loaded.model, loaded.params, path)
        ours, theirs = load_file(path), load_file(GOLDENS / name / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            np.testing.assert_array_equal(array, theirs[key])


def header(path):
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length))


def test_float16_and_not_square_and_scanned(tmp_path):
    config = ViTConfig(
        image_size=(12, 20), patch_size=(4, 5), width=8, depth=3, heads=2, mlp_dim=12,
        num_classes=2, registers=1, scan=True, dropout=0.1,
    )  # fmt: skip
    model = ViT(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 20, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), shapes)
    export_timm(model, params, tmp_path / "half.safetensors", dtype="float16")
    kinds = {v["dtype"] for k, v in header(tmp_path / "half.safetensors").items() if k[0] != "_"}
    assert kinds == {"F16"}
    again = load_checkpoint(tmp_path / "half.safetensors")
    assert again.model.config == config
    half = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, again.params, half)
    looped = load_checkpoint(tmp_path / "half.safetensors", scan=False)
    images = jnp.ones((1, 12, 20, 3))
    np.testing.assert_allclose(logits(looped, images), logits(again, images), atol=1e-5)


def test_stack_and_unstack():
    params = load("timm_vit").params
    stacked = stack_layers(params)
    assert stacked["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"].shape == (2, 16)
    assert "encoderblock_0" in params["Transformer"], "the argument is left alone"
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)


def test_a_few_images_get_one_block_for_all_layers():
    loaded = load("timm_vit")
    few, images = loaded.for_few(1), np.ones((1, *loaded.model.config.image_size, 3), np.float32)
    assert few.model.config == dataclasses.replace(loaded.model.config, scan=True)
    jax.tree.map(np.testing.assert_array_equal, few.params, stack_layers(loaded.params))
    np.testing.assert_allclose(logits(few, images), logits(loaded, images), atol=1e-5)
    assert loaded.for_few(1000) is loaded and few.for_few(1) is few
    model, params = to_winft(loaded.model, loaded.params, WindowConfig(layers=(1,), groups=1))
    unlike = loaded._replace(model=model, params=params)
    assert unlike.for_few(1) is unlike, "no block stands for one with windows and one without"


def test_export_refuses_what_does_not_fit(tmp_path):
    vit, path = load("timm_vit"), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="2 class names for 3 outputs"):
        export_timm(vit.model, vit.params, path, class_names=["a", "b"])
    with pytest.raises(ValueError, match="dtype='int8'"):
        export_timm(vit.model, vit.params, path, dtype="int8")
    params = {name: value for name, value in vit.params.items() if name != "cls"}
    with pytest.raises(ValueError, match=r"the given parameters: 1 missing \(cls\)"):
        export_timm(vit.model, params, path)
    assert not path.exists()


def test_config_of_the_hub_is_heard(tmp_path):
    shutil.copy(GOLDENS / "timm_vit" / "model.safetensors", tmp_path)
    picture = {
        "input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "squash",
    }  # fmt: skip
    config = {"architecture": "deit_tiny_patch16_224", "global_pool": "avg",
              "model_args": {"act_layer": "quick_gelu"}, "pretrained_cfg": picture,
              "label_names": ["a", "b", "c"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path)
    assert loaded.model.config.activation == "gelu_quick" and loaded.model.config.pool == "gap"
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.preprocess == Preprocess(
        size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear",
        crop="stretch", crop_pct=0.8,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "deit_tiny_patch16_224"}))
    assert load_checkpoint(tmp_path).preprocess.mean == (0.485, 0.456, 0.406)


def test_names_of_metas_dinov2_files(tmp_path):
    """`w12` and `w3` for the gated MLP, `register_tokens`, a mask token; gate and value apart."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(GOLDENS / "timm_registers" / "model.safetensors")
    spelled = {"reg_token": "register_tokens", "mlp.fc1.": "mlp.w12.", "mlp.fc2.": "mlp.w3."}
    meta, apart = {"mask_token": np.zeros((1, 16), np.float32)}, {}
    for name, array in arrays.items():
        for old, new in spelled.items():
            name = name.replace(old, new)
        meta[name] = array
    for name, array in arrays.items():
        if "mlp.fc1" in name:
            apart[name.replace("fc1", "fc1_g")], apart[name.replace("fc1", "fc1_x")] = (
                np.ascontiguousarray(half) for half in np.split(array, 2)
            )
        else:
            apart[name] = array
    first = load("timm_registers").params
    for number, other in enumerate((meta, apart)):
        save_file(other, tmp_path / f"{number}.safetensors")
        again = load_checkpoint(tmp_path / f"{number}.safetensors", heads=2).params
        jax.tree.map(np.testing.assert_array_equal, again, first)
