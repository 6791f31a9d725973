"""Vision Transformers of `transformers` and `timm` with random weights, to compare with.

Every parameter gets a random value, so that none of them can be forgotten unnoticed: a layer
scale of 1 or a bias of 0 would hide a mistake.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Peer(NamedTuple):
    """One architecture: names in `transformers`, sizes for tests, real sizes."""

    config: str
    model: str
    tiny: dict[str, Any]
    full: dict[str, Any]
    preprocessor: dict[str, Any] | None = None


_TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_MLP = {"intermediate_size": 32}
_BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "intermediate_size": 3072,
}  # fmt: skip
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_DINOV2 = {**_SMALL, "image_size": 518, "patch_size": 14}
_GIANT = {**_DINOV2, "hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True}
_CLIP = {**_BASE, "patch_size": 32, "projection_dim": 512}
_TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}

PEERS = {
    "vit": Peer(
        "ViTConfig", "ViTForImageClassification",
        {**_TINY, **_MLP, **_LABELS}, {**_BASE, "patch_size": 16, "num_labels": 1000},
        {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 2, "do_resize": True,
         "size": {"height": 16, "width": 16}},
    ),
    "vit_features": Peer("ViTConfig", "ViTModel", {**_TINY, **_MLP}, {**_BASE, "patch_size": 32}),
    "deit": Peer(
        "DeiTConfig", "DeiTForImageClassification",
        {**_TINY, **_MLP, **_LABELS}, {**_BASE, "patch_size": 16, "num_labels": 1000},
    ),
    "deit_distilled": Peer(
        "DeiTConfig", "DeiTForImageClassificationWithTeacher", {**_TINY, **_MLP, **_LABELS},
        {**_BASE, **_SMALL, "intermediate_size": 1536, "patch_size": 16, "num_labels": 1000},
    ),
    "dinov2": Peer(
        "Dinov2Config", "Dinov2ForImageClassification",
        {**_TINY, "mlp_ratio": 2, **_LABELS}, {**_DINOV2, "num_labels": 1000},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
         "do_center_crop": True, "size": {"shortest_edge": 16},
         "crop_size": {"height": 12, "width": 12}},
    ),
    "dinov2_registers": Peer(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification",
        {**_TINY, "mlp_ratio": 2, "num_register_tokens": 3, **_LABELS},
        {**_DINOV2, "num_labels": 1000},
    ),
    "dinov2_swiglu": Peer(
        "Dinov2Config", "Dinov2Model",
        {**_TINY, "use_swiglu_ffn": True}, {**_GIANT, "num_hidden_layers": 4},
    ),
    "dinov2_registers_swiglu": Peer(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel",
        {**_TINY, "use_swiglu_ffn": True}, {**_GIANT, "num_hidden_layers": 4},
    ),
    "clip_vision": Peer("CLIPVisionConfig", "CLIPVisionModel", {**_TINY, **_MLP}, _CLIP),
    "clip_projection": Peer(
        "CLIPVisionConfig", "CLIPVisionModelWithProjection",
        {**_TINY, **_MLP, "projection_dim": 8}, _CLIP,
    ),
    "clip_both_towers": Peer(
        "CLIPConfig", "CLIPModel",
        {"vision_config": {**_TINY, **_MLP}, "text_config": _TEXT, "projection_dim": 8},
        {"vision_config": _CLIP, "text_config": _TEXT, "projection_dim": 512},
    ),
}  # fmt: skip


# timm's VisionTransformer; every model is tiny. Its gated MLP is SwiGLU only with SiLU.
_TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
         "num_classes": 3}  # fmt: skip
TIMM_PEERS: dict[str, dict[str, Any]] = {
    "timm_vit": {"qk_norm": True},
    "timm_registers": {
        "reg_tokens": 3, "no_embed_class": True, "init_values": 0.1, "mlp_layer": "SwiGLUPacked",
        "act_layer": "silu", "global_pool": "avg", "qkv_bias": False,
    },
    "timm_map": {"class_token": False, "global_pool": "map"},
    "timm_clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5},
    "timm_distilled": {"distilled": True},
}  # fmt: skip


def build(name: str, full: bool = False, seed: int = 0) -> Any:
    """A `transformers` model of `PEERS[name]` in evaluation mode, every parameter random."""
    import transformers

    peer = PEERS[name]
    config = getattr(transformers, peer.config)(**(peer.full if full else peer.tiny))
    model = getattr(transformers, peer.model)(config).eval()
    model.set_attn_implementation("eager")
    randomise(model, seed)
    return model


def build_timm(name: str, seed: int = 0) -> Any:
    """A timm model of `TIMM_PEERS[name]` in evaluation mode, every parameter random."""
    import timm

    settings = {**_TIMM, **TIMM_PEERS[name]}
    if "mlp_layer" in settings:
        settings["mlp_layer"] = getattr(timm.layers, settings["mlp_layer"])
    if "norm_eps" in settings:
        norm = functools.partial(timm.layers.LayerNorm, eps=settings.pop("norm_eps"))
        settings["norm_layer"] = norm
    family = timm.models.vision_transformer.VisionTransformer
    if settings.pop("distilled", False):
        family = timm.models.deit.VisionTransformerDistilled
    model = family(**settings).eval()
    randomise(model, seed)
    return model


def run_timm(model: Any, images: np.ndarray) -> np.ndarray:
    """Logits `[B, C]` of a timm model, its positions resized when images have another size."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        model.set_input_size(tuple(images.shape[1:3]))
        return model(pixels).numpy()


def randomise(model: Any, seed: int) -> None:
    """Gives every parameter of a PyTorch model a random value of a fitting size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in path.lower() and path.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif path.endswith(("lambda1", "gamma")):
                value.copy_(0.4 + 0.1 * noise)
            elif value.ndim >= 2 and not path.endswith(("embeddings", "_embed", "_token")):
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise)


def save(name: str, model: Any, folder: pathlib.Path, **settings: Any) -> None:
    """`save_pretrained`, and `preprocessor_config.json` where the peer has one."""
    import json

    model.save_pretrained(folder, **settings)
    if PEERS[name].preprocessor:
        text = json.dumps(PEERS[name].preprocessor, indent=1)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def run(name: str, model: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (or features) `[B, C]` and attention `[L, B, H, N, N]` of a peer.

    Args:
      name: a key of `PEERS`.
      model: what `build` made.
      images: `[B, height, width, 3]`; positions are interpolated when the size is another.
    """
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    settings: dict[str, Any] = {"output_attentions": True}
    if "dinov2" not in name:
        settings["interpolate_pos_encoding"] = True
    with torch.no_grad():
        if name == "clip_both_towers":
            output = model.vision_model(pixels, **settings)
            result = model.visual_projection(output.pooler_output)
        else:
            output = model(pixels, **settings)
            if name in ("vit_features", "dinov2_swiglu", "dinov2_registers_swiglu"):
                result = output.last_hidden_state[:, 0]
            else:
                result = next(
                    output[key] for key in ("logits", "image_embeds", "pooler_output")
                    if key in output
                )  # fmt: skip
    return result.numpy(), torch.stack(output.attentions).numpy()


def run_ours(model: Any, params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same two arrays from our model, through the explicit attention path."""
    import jax

    from vit_interact.models.attention import PREFIX, Taps
    from vit_interact.models.vit import ViT

    tapped = ViT(model.config, Taps(kinds=("weights",)))
    apply = jax.jit(lambda p, x: tapped.apply({"params": p}, x, mutable=["intermediates"]))
    logits, state = apply(params, images)
    blocks = state["intermediates"]["Transformer"]
    weights = [
        blocks[f"encoderblock_{i}"]["MultiHeadDotProductAttention_0"][f"{PREFIX}weights"][0]
        for i in range(model.config.depth)
    ]
    return np.asarray(logits), np.stack(weights)


def pictures(size: tuple[int, int], batch: int = 2, seed: int = 1) -> np.ndarray:
    """Random normalised images `[B, height, width, 3]`."""
    shape = (batch, *size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
