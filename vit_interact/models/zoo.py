"""Named architectures: ViT, DeiT, DINOv2 and CLIP image towers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vit_interact.models.config import ViTConfig, as_pair

if TYPE_CHECKING:
    from vit_interact.models.vit import ViT

# width, depth, heads; the MLP is four times as wide except in H (5120) and g (SwiGLU).
_SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
    "g": (1536, 40, 24),
}


def _sized(size: str, patch: int, **fields: Any) -> ViTConfig:
    width, depth, heads = _SIZES[size]
    fields.setdefault("mlp_dim", 4 * width)
    return ViTConfig(patch_size=(patch, patch), width=width, depth=depth, heads=heads, **fields)


def _build_table() -> dict[str, ViTConfig]:
    table = {}
    for size, patches in {
        "ti": (16,), "s": (8, 14, 16, 32), "b": (8, 16, 32), "l": (14, 16, 32), "h": (14,),
    }.items():  # fmt: skip
        for patch in patches:
            table[f"vit_{size}{patch}"] = _sized(size, patch)
    for size in ("ti", "s", "b"):
        table[f"deit_{size}16"] = _sized(size, 16)
        table[f"deit_{size}16_distilled"] = _sized(size, 16, distilled=True, pos_prefix=2)
    for size in ("s", "b", "l", "g"):
        gated: dict[str, Any] = {"swiglu": True, "mlp_dim": 4096} if size == "g" else {}
        for suffix, registers in (("", 0), ("_reg", 4)):
            table[f"dinov2_{size}14{suffix}"] = _sized(
                size, 14, image_size=(518, 518), registers=registers, layer_scale=1e-5,
                num_classes=0, **gated,
            )  # fmt: skip
    for name, size, patch, embed in (
        ("clip_b32", "b", 32, 512), ("clip_b16", "b", 16, 512), ("clip_l14", "l", 14, 768),
    ):  # fmt: skip
        table[name] = _sized(
            size, patch, activation="gelu_quick", pre_norm=True, patch_bias=False, head_bias=False,
            norm_before_pool=False, norm_eps=1e-5, num_classes=embed,
        )  # fmt: skip
    return table


_CONFIGS = _build_table()


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(_CONFIGS)


def model_config(name: str, **overrides: Any) -> ViTConfig:
    """The config of a named architecture, fields replaced by `overrides`.

    Args:
      name: one of `list_models()`.
      **overrides: fields of `ViTConfig`; `image_size` and `patch_size` may be one int.

    Raises:
      ValueError: for an unknown name (the nearest ones are named) or field.
    """
    if name not in _CONFIGS:
        import difflib

        near = difflib.get_close_matches(name, _CONFIGS, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
            + " (see `vit-interact models`)"
        )  # fmt: skip
    for pair in ("image_size", "patch_size"):
        if pair in overrides:
            overrides[pair] = as_pair(overrides[pair], pair)
    return ViTConfig.from_dict({**_CONFIGS[name].to_dict(), **overrides})


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> ViT:
    """Builds a model by name; parameters come from `model.init` or `load_model`.

    Args:
      name: one of `list_models()`.
      num_classes: outputs of the head; None keeps the architecture's own, 0 returns features.
      **overrides: fields of `ViTConfig`, such as `image_size=(224, 160)`, `scan=True` or
        `dtype="bfloat16"`.

    Returns:
      A Flax linen module: `model.apply({"params": params}, images [B, h, w, 3]) -> [B, classes]`.

    Raises:
      ValueError: for an unknown name or field.
    """
    from vit_interact.models.vit import ViT

    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return ViT(model_config(name, **overrides))
