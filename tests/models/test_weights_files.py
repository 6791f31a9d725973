"""Where weights come from, and what is said when they cannot be loaded."""

import builtins
import importlib.util
import json
import logging
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.helpers import GOLDENS
from vit_interact.models.config import ViTConfig
from vit_interact.models.sources import conversion_command
from vit_interact.models.weights import WeightsError, load_checkpoint, load_model

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="needs PyTorch, which is not installed"
)


@pytest.fixture
def vit(tmp_path):
    """A folder that a test may spoil."""
    return pathlib.Path(shutil.copytree(GOLDENS / "vit", tmp_path / "vit"))


def refusal(source, **settings):
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(folder, change_arrays):
    path = folder / "model.safetensors"
    arrays = load_file(path)
    change_arrays(arrays)
    save_file(arrays, path)
    return path


def test_files_that_are_not_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    for content, words in (
        (b"", "is empty"),
        (b"# notes about the model, longer than a few bytes\n", "is not a weights file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04 cut short", "damaged or cut short"),
    ):
        path.write_bytes(content)
        message = refusal(path)
        assert words in message and str(path) in message
    assert "no such file or folder" in refusal(tmp_path / "missing.npz")
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors and no .npz" in refusal(tmp_path / "empty")


def test_damaged_safetensors_and_npz(vit, tmp_path):
    path = vit / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged or cut short" in refusal(vit)
    whole = tmp_path / "x.npz"
    np.savez(whole, **{"embedding/kernel": np.random.default_rng(0).normal(size=(4, 4, 3, 16))})
    data = bytearray(whole.read_bytes())
    data[300] ^= 255
    whole.write_bytes(data)
    assert "is damaged: embedding/kernel cannot be read" in refusal(whole)


def test_other_archives_and_formats(tmp_path):
    archive = tmp_path / "a.npz"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no arrays")
    assert "holds other files than arrays" in refusal(archive)
    save_file({"conv1.weight": np.ones((2, 2))}, tmp_path / "resnet.safetensors")
    message = refusal(tmp_path / "resnet.safetensors")
    assert "is in no known format (Google npz, timm, " in message and "conv1.weight" in message


def test_pickles_are_refused_whatever_their_suffix(tmp_path):
    for name in ("w.pt", "w.pth", "w.bin", "w.safetensors", "w.npz"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"a": np.ones(3)}, protocol=2))
        assert "is a pickle" in refusal(path)
    zipped = tmp_path / "zipped.safetensors"
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
    assert "is a pickle" in refusal(zipped)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    assert "pytorch_model.bin is a pickle" in refusal(folder)


@needs_torch
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_command_for_pickles_converts_them(tmp_path, wrapped):
    import torch

    state = {k: torch.from_numpy(v) for k, v in
             load_file(GOLDENS / "timm_vit" / "model.safetensors").items()}  # fmt: skip
    path = tmp_path / "it's a model.pth"
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    command = refusal(path).partition("installed: ")[2]
    assert command == conversion_command(path)
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, timeout=120)
    converted = load_checkpoint(tmp_path / "it's a model.safetensors")
    golden = load_checkpoint(GOLDENS / "timm_vit")
    np.testing.assert_array_equal(
        converted.params["head"]["kernel"], golden.params["head"]["kernel"]
    )


def test_missing_extra_and_differing_are_named(vit):
    def spoil(arrays):
        del arrays["vit.encoder.layer.1.output.dense.bias"]
        arrays["vit.encoder.layer.0.adapter.weight"] = np.ones((2, 2), np.float32)
        arrays["vit.layernorm.bias"] = np.ones(5, np.float32)

    change(vit, spoil)
    message = refusal(vit)
    assert "1 missing (Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias)" in message
    assert "1 extra (encoder.layer.0.adapter.weight)" in message
    assert "encoder_norm/bias is [5] in the file and [16] in the model" in message


def test_a_backbone_cut_off_is_no_vision_transformer(vit):
    change(vit, lambda arrays: arrays.pop("vit.embeddings.position_embeddings"))
    assert "not a whole Vision Transformer: pos_embedding missing" in refusal(vit)


def test_head_is_dropped_only_when_asked(vit):
    message = refusal(vit, num_classes=5)
    assert "head/kernel is [16, 3] in the file and [16, 5] in the model" in message
    assert "drop_head=True" in message
    assert load_checkpoint(vit, num_classes=3).class_names == ("ant", "bee", "cat")

    new = load_checkpoint(vit, num_classes=5, drop_head=True)
    assert new.params["head"]["kernel"].shape == (16, 5) and new.class_names is None
    assert not np.any(new.params["head"]["kernel"])
    assert any("a new head of 5 classes" in note for note in new.notes)
    features = load_checkpoint(vit, drop_head=True)
    assert features.model.config.num_classes == 0 and "head" not in features.params
    assert "drop_head=True" in refusal(GOLDENS / "vit_features", num_classes=5)


def test_arch_has_to_fit():
    assert "heads=3 (arch='vit_ti16') does not divide" in refusal(GOLDENS / "vit", arch="vit_ti16")
    message = refusal(GOLDENS / "vit", arch="vit_l14")
    assert "352 missing (Transformer/encoderblock_10/" in message
    assert " in the file and [1024" in message and "in the model; and 31 more" in message
    config = load_checkpoint(GOLDENS / "vit").model.config
    wanted = {**config.to_dict(), "activation": "gelu_tanh", "norm_eps": 1e-3, "num_classes": 4}
    message = refusal(GOLDENS / "vit", arch=ViTConfig.from_dict(wanted))
    assert "[16, 3] in the file and [16, 4] in the model" in message
    wanted["num_classes"] = 3
    loaded = load_checkpoint(GOLDENS / "vit", arch=ViTConfig.from_dict(wanted)).model.config
    assert (loaded.activation, loaded.norm_eps) == ("gelu_tanh", 1e-3)


def test_a_grid_that_is_not_square_needs_a_word(vit):
    def widen(arrays):
        name = "vit.embeddings.position_embeddings"
        arrays[name] = np.concatenate([arrays[name], arrays[name][:, :4]], axis=1)

    change(vit, widen)
    assert "21 rows, which is no square grid and 1 prefix tokens" in refusal(vit)
    assert load_checkpoint(vit, image_size=(20, 16)).model.config.image_size == (20, 16)
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "image_size": [16, 20]}))
    assert load_checkpoint(vit).model.config.image_size == (16, 20)
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        load_checkpoint(vit, image_size=(18, 16))


def test_config_that_asks_for_too_much(vit):
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert "asks for the activation 'relu'" in refusal(vit)
    (vit / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(vit)


def test_shards_that_are_missing(vit):
    (vit / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../../etc/passwd"}}
    (vit / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(vit)
    assert "shards that are not beside it: model-00001-of-00002.safetensors, passwd" in message


def test_names_of_architectures_are_not_weights():
    message = refusal("vit_b16")
    assert "names an architecture, not weights" in message and "create_model('vit_b16')" in message


def test_overrides_and_logging(caplog):
    with caplog.at_level(logging.INFO, logger="vit_interact.models.weights"):
        model, params = load_model(GOLDENS / "vit", scan=True, dtype="bfloat16")
    assert model.config.scan and model.config.dtype == "bfloat16"
    assert params["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"].shape == (2, 16)
    assert "from config.json: activation=gelu" in caplog.text
    with pytest.raises(ValueError, match=r"unknown model settings \['depht'\]"):
        load_model(GOLDENS / "vit", depht=3)


def test_hash_is_that_of_the_file():
    import hashlib

    path = GOLDENS / "vit" / "model.safetensors"
    assert load_checkpoint(path.parent).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_hub_from_the_cache(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--vit"
    shutil.copytree(GOLDENS / "vit", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = load_checkpoint("hf:someone/vit")
    assert loaded.source == "hf:someone/vit" and loaded.class_names == ("ant", "bee", "cat")
    assert load_checkpoint(f"hf:someone/vit@{commit}").sha256 == loaded.sha256
    message = refusal("hf:someone/other")
    assert "not in the cache and the hub cannot be reached" in message
    assert "hf download someone/other" in message


def test_hub_without_its_library(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **settings):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'vit-interact[hub]'" in refusal("hf:someone/vit")
