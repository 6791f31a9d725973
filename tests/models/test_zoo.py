import dataclasses
import functools

import jax
import pytest

import vit_interact as vi
from tests.models.test_vit import FAMILY
from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import ViT
from vit_interact.models.zoo import model_config

# With the usual 1,000 classes (DINOv2 without head, CLIP with its projection). ViT and DeiT: the
# published counts. DINOv2's published ones hold a mask token (`width` numbers) that only its
# training uses, so ours plus `width` is the published number.
COUNTS = {
    "vit_ti16": 5_717_416, "vit_s8": 22_055_272, "vit_s14": 22_004_584,
    "vit_s16": 22_050_664, "vit_s32": 22_878_952, "vit_b8": 86_576_872, "vit_b16": 86_567_656,
    "vit_b32": 88_224_232, "vit_l14": 304_203_752, "vit_l16": 304_326_632,
    "vit_l32": 306_535_400, "vit_h14": 632_045_800,
    "deit_ti16": 5_717_416, "deit_ti16_distilled": 5_910_800, "deit_s16": 22_050_664,
    "deit_s16_distilled": 22_436_432, "deit_b16": 86_567_656, "deit_b16_distilled": 87_338_192,
    "dinov2_s14": 22_056_576 - 384, "dinov2_s14_reg": 22_058_112 - 384,
    "dinov2_b14": 86_580_480 - 768, "dinov2_b14_reg": 86_583_552 - 768,
    "dinov2_l14": 304_368_640 - 1024, "dinov2_l14_reg": 304_372_736 - 1024,
    "dinov2_g14": 1_136_480_768 - 1536, "dinov2_g14_reg": 1_136_486_912 - 1536,
    "clip_b32": 87_456_000 + 768 * 512, "clip_b16": 85_799_424 + 768 * 512,
    "clip_l14": 303_179_776 + 1024 * 768,
}  # fmt: skip


def test_every_name_is_pinned():
    assert sorted(COUNTS) == sorted(vi.list_models())


@functools.cache
def made(config):
    image = jax.ShapeDtypeStruct((1, *config.image_size, 3), "float32")
    # Layers in a scan are as large, and are traced once.
    config = dataclasses.replace(config, scan=True)
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    assert made(model_config(name)) == COUNTS[name]


@pytest.mark.parametrize("config", [*vi.list_models(), *FAMILY])
def test_counting_by_arithmetic(config):
    config = ViTConfig(**FAMILY[config]) if config in FAMILY else model_config(config)
    assert config.count_parameters() == made(config)


def test_overrides_and_pairs():
    config = model_config("vit_s16", image_size=(96, 64), num_classes=0, patch_size=8)
    assert config.layout == vi.TokenLayout(rows=12, cols=8, prefix=1)
    assert config == vi.ViTConfig.from_dict(config.to_dict())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_b61", {}, "unknown model 'vit_b61'; did you mean vit_b16"),
        (
            "vit_s16",
            {"image_size": 225},
            "image height 225 is not a multiple of the patch height 16",
        ),
        ("vit_s16", {"image_size": "224"}, "expected a positive int"),
        ("vit_s16", {"colour": 1}, r"unknown model settings \['colour'\]"),
        ("vit_s16", {"heads": 5}, "width 384 is not a multiple of heads 5"),
        ("vit_s16", {"pool": "max"}, "expected one of"),
        ("vit_s16", {"cls_token": False, "pos_prefix": 0}, "needs cls_token"),
        ("vit_s16", {"pos_prefix": 2}, "1 prefix tokens"),
    ],
)
def test_bad_settings_say_what_was_expected(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        vi.create_model(name, **overrides)
