"""A `ViTConfig` from the shapes of parameters, and a report where the two do not fit."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vit_interact.models.config import ViTConfig
from vit_interact.models.conventions import Facts
from vit_interact.models.formats import GOOGLE, Arrays, Format
from vit_interact.models.posembed import sincos_position_embedding
from vit_interact.models.sources import WeightsError
from vit_interact.programs import remembered

# Models whose heads are not 64 wide: ViT-H, SO400M, ViT-g, ViT-G, all with 16 heads.
_SIXTEEN_HEADS = (1152, 1280, 1408, 1664)
# What a named architecture fixes; everything else comes from the file.
_STRUCTURE = (
    "patch_size", "width", "depth", "heads", "mlp_dim", "cls_token", "registers", "distilled",
    "layer_scale", "swiglu", "qk_norm", "pre_norm", "patch_bias",
)  # fmt: skip
_BLOCK_0 = "Transformer/encoderblock_0"
_ATTENTION_0 = f"{_BLOCK_0}/MultiHeadDotProductAttention_0"


def find_heads(form: Format, arrays: Arrays, facts: Facts) -> int:
    """Attention heads: from shapes where they show, else from `facts`, else 64 wide.

    Args:
      form: the format of `arrays`.
      arrays: canonical names to arrays.
      facts: what else is known; gets the answer when it was a guess.

    Raises:
      WeightsError: when the width is no multiple of 64 and nobody said how many heads there are.
    """
    config = facts.get("config")
    if form is GOOGLE:
        shapes = [x.shape for name, x in arrays.items() if name.endswith("query/kernel")]
        return shapes[0][-2] if shapes else 1
    qkv = re.compile(r"(\.qkv|\.query|\.q_proj)\.weight$")
    widths = [x.shape[-1] for name, x in arrays.items() if qkv.search(name)]
    width = widths[0] if widths else 64
    normed = [x.shape[0] for name, x in arrays.items() if name.endswith(".q_norm.weight")]
    if normed:
        return width // normed[0]
    heads = facts.get("heads") or (config.heads if config else None)
    if heads is None:
        heads = 16 if width in _SIXTEEN_HEADS else width // 64
        if width not in _SIXTEEN_HEADS and width % 64:
            raise WeightsError(
                f"no file says how many attention heads this model of width {width} has; "
                "pass heads=..."
            )
        facts.say("the convention for this width", heads=heads)
    if width % heads:
        source = facts.sources.get("heads", "arch=")
        raise WeightsError(
            f"heads={heads} ({source}) does not divide the width {width} of the file"
        )
    return heads


def complete(form: Format, arrays: Arrays, facts: Facts, size: Any) -> list[str]:
    """Adds what a format leaves out, so that `arrays` has what the model needs; changes `arrays`.

    Args:
      form: the format the arrays came from.
      arrays: our flat paths to arrays.
      facts: what else is known.
      size: the caller's image size (height, width), or None.

    Returns:
      Notes on what was added.
    """
    notes = []
    stacked = [name for name in arrays if name.startswith("Transformer/encoderblock/")]
    for name in stacked:
        for i, layer in enumerate(arrays.pop(name)):
            arrays[name.replace("encoderblock/", f"encoderblock_{i}/")] = layer
    unbiased = 0
    for name in [n for n in arrays if re.search(r"Attention_0/(query|key|value)/kernel$", n)]:
        bias = name.replace("/kernel", "/bias")
        if bias not in arrays:
            arrays[bias] = np.zeros(arrays[name].shape[1:], np.float32)
            unbiased += 1
    if unbiased:
        notes.append(f"{unbiased} query, key and value projections have no bias: zeros")
    # Hugging Face's DeiT with one head has the token but not the head: then it is a register.
    if "dist" in arrays and "head/kernel" in arrays and "head_dist/kernel" not in arrays:
        arrays["reg"] = arrays.pop("dist")
        notes.append("a distillation token without a head of its own: kept as a register token")
    config = facts.get("config")
    if config is not None and not config.norm_before_pool and "pool_norm/scale" not in arrays:
        _rename(arrays, "Transformer/encoder_norm/", "pool_norm/")
    if form is GOOGLE and "pos_embedding" not in arrays and "embedding/kernel" in arrays:
        rows, cols, _, width = arrays["embedding/kernel"].shape
        height, breadth = size or facts.get("image_size") or (224, 224)
        grid = (height // rows, breadth // cols)
        arrays["pos_embedding"] = sincos_position_embedding(grid, width)
        facts.say("the sine-cosine positions made for it", grid=grid)
        notes.append(
            f"no position embedding in the file: big_vision's fixed sincos2d for {height}x{breadth}"
            + ("" if size else "; pass image_size= for another")
        )
    return notes


def without_pool_norm(arrays: Arrays, config: ViTConfig) -> Arrays:
    """For export: timm's CLIP towers call the norm of the pooled class token `norm`."""
    arrays = dict(arrays)
    if config.pool == "cls" and not config.norm_before_pool:
        _rename(arrays, "pool_norm/", "Transformer/encoder_norm/")
    return arrays


def _rename(arrays: Arrays, old: str, new: str) -> None:
    for name in [name for name in arrays if name.startswith(old)]:
        arrays[name.replace(old, new)] = arrays.pop(name)


def infer_config(arrays: Arrays, facts: Facts, arch: str | None, size: Any) -> ViTConfig:
    """The architecture of a file, at the image size of its own position embedding.

    Args:
      arrays: our flat paths to arrays.
      facts: what shapes do not tell; gets the grid when it was taken to be square.
      arch: a name of `list_models()` that the file has to fit, or None.
      size: the caller's image size (height, width), the last resort for the grid.

    Raises:
      WeightsError: when parts that every Vision Transformer has are missing.
    """
    needed = (
        "embedding/kernel", "pos_embedding", f"{_ATTENTION_0}/query/kernel",
        f"{_BLOCK_0}/MlpBlock_0/Dense_0/kernel", f"{_BLOCK_0}/MlpBlock_0/Dense_1/kernel",
    )  # fmt: skip
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise WeightsError(f"not a whole Vision Transformer: {few(missing)} missing")
    kernel = arrays["embedding/kernel"]
    if kernel.ndim != 4 or kernel.shape[2] != 3:
        raise WeightsError(
            f"the patch embedding has shape {list(kernel.shape)}; expected [height, width, 3, D]"
        )
    patch, width = (kernel.shape[0], kernel.shape[1]), kernel.shape[3]
    hidden = arrays[f"{_BLOCK_0}/MlpBlock_0/Dense_1/kernel"].shape[0]
    head = arrays.get("head/kernel")
    fields: dict[str, Any] = {
        "patch_size": patch,
        "width": width,
        "depth": sum(bool(re.fullmatch(r"\w+/encoderblock_\d+/LayerNorm_0/scale", n))
                     for n in arrays),
        "heads": arrays[f"{_ATTENTION_0}/query/kernel"].shape[1],
        "mlp_dim": hidden,
        "num_classes": 0 if head is None else head.shape[1],
        "cls_token": "cls" in arrays,
        "registers": arrays["reg"].shape[1] if "reg" in arrays else 0,
        "distilled": "dist" in arrays,
        "layer_scale": facts.get("layer_scale", 1e-5) if f"{_BLOCK_0}/ls1" in arrays else None,
        "swiglu": arrays[f"{_BLOCK_0}/MlpBlock_0/Dense_0/kernel"].shape[1] == 2 * hidden,
        "qk_norm": f"{_ATTENTION_0}/query_norm/scale" in arrays,
        "pre_norm": "pre_norm/scale" in arrays,
        "patch_bias": "embedding/bias" in arrays,
        "head_bias": head is None or "head/bias" in arrays,
        "norm_before_pool": "Transformer/encoder_norm/scale" in arrays,
        "activation": facts.get("activation"),
        "norm_eps": facts.get("norm_eps"),
    }  # fmt: skip
    fields["pool"] = _pool(arrays, facts)
    given = facts.get("config")
    if arch is not None:
        from vit_interact.models.zoo import model_config

        named = model_config(arch).to_dict()
        fields.update({key: named[key] for key in _STRUCTURE})
    if given is not None:
        fields = given.to_dict()
    patch = fields["patch_size"]
    prefix = fields["cls_token"] + fields["distilled"] + fields["registers"]
    grid, fields["pos_prefix"] = _grid(arrays["pos_embedding"].shape[1], prefix, patch, facts, size)
    fields["image_size"] = (grid[0] * patch[0], grid[1] * patch[1])
    return ViTConfig.from_dict(fields)


def _pool(arrays: Arrays, facts: Facts) -> str:
    if "MAPHead_0/probe" in arrays:
        return "map"
    head, width = arrays.get("head/kernel"), arrays["embedding/kernel"].shape[3]
    if head is not None and head.shape[0] == 2 * width:
        return "cls_gap"
    if "cls" not in arrays:
        return "gap"
    # timm's fc_norm belongs to the mean; CLIP's norm of the pooled vector to the class token.
    normed_mean = "pool_norm/scale" in arrays and "pre_norm/scale" not in arrays
    return facts.get("pool") or ("gap" if normed_mean else "cls")


def _grid(
    rows: int, prefix: int, patch: tuple[int, int], facts: Facts, size: Any
) -> tuple[tuple[int, int], int]:
    """The grid of a position embedding and how many prefix tokens have a row in it."""
    given = facts.get("config")
    sizes = [facts.get("image_size"), given and given.image_size]
    known = [facts.get("grid")] + [s and (s[0] // patch[0], s[1] // patch[1]) for s in sizes]
    # The class token's row alone is the most usual; registers rarely have rows.
    prefixes = [n for n in dict.fromkeys((1, 0, 2, prefix)) if n <= prefix]
    if given is not None:
        prefixes = [given.pos_prefix]
    for grid in filter(None, known):
        for n in prefixes:
            if rows == n + grid[0] * grid[1]:
                return grid, n
    for n in prefixes:
        side = math.isqrt(max(0, rows - n))
        if side and side * side == rows - n:
            facts.say(f"the square that fits {rows} rows of positions", grid=(side, side))
            return (side, side), n
    asked = size and (size[0] // patch[0], size[1] // patch[1])
    for n in prefixes:
        if asked and rows == n + asked[0] * asked[1]:
            return asked, n
    raise WeightsError(
        f"the position embedding has {rows} rows, which is no square grid and {prefix} prefix "
        "tokens; say which image size it was made for: arch=ViTConfig(image_size=(h, w), ...)"
    )


def expected_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Flat paths of the unstacked parameters of a model to their shapes."""
    return {path: tuple(shape) for path, shape in remembered(_traced_shapes, config).items()}


def _traced_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    from vit_interact.models.vit import ViT

    # Blocks without windows are alike, so one is traced for all.
    alike = config.windows is None
    depth = 1 if alike else config.depth
    traced = dataclasses.replace(config, scan=False, remat=False, depth=depth)
    image = jax.ShapeDtypeStruct((1, *config.image_size, 3), "float32")
    # Its shape only: `jax.random.key` itself would compile a program.
    key = jax.eval_shape(jax.random.key, 0)
    flat = traverse_util.flatten_dict(
        jax.eval_shape(ViT(traced).init, key, image)["params"], sep="/"
    )
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    block = "Transformer/encoderblock_0/"
    for path in [path for path in shapes if alike and path.startswith(block)]:
        for layer in range(1, config.depth):
            shapes[path.replace("_0/", f"_{layer}/", 1)] = shapes[path]
    return shapes


def check_fit(arrays: Arrays, extra: list[str], config: ViTConfig, label: str) -> None:
    """Compares a file with the model it is for.

    Raises:
      WeightsError: naming missing and extra parameters, and shapes that differ side by side.
    """
    expected = expected_shapes(config)
    missing = sorted(set(expected) - set(arrays))
    extra = sorted([*extra, *(set(arrays) - set(expected))])
    differing = [
        f"{path} is {list(arrays[path].shape)} in the file and {list(shape)} in the model"
        for path, shape in expected.items()
        if path in arrays and arrays[path].shape != shape
    ]
    if not (missing or extra or differing):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({few(missing)})")
    if extra:
        parts.append(f"{len(extra)} extra ({few(extra)})")
    if differing:
        parts.append(f"{len(differing)} of another shape ({few(differing, '; ')})")
    hint = ""
    heads = ("head", "pre_logits", "classifier")
    if any(name.startswith(heads) for name in [*missing, *extra, *differing]):
        hint = (
            "; pass drop_head=True to leave the head out (with num_classes=N: to begin a new one)"
        )
    raise WeightsError(f"parameters that do not fit the model in {label}: {'; '.join(parts)}{hint}")


def few(names: list[str], separator: str = ", ") -> str:
    """The first eight names, and how many more there are."""
    more = f"{separator}and {len(names) - 8} more" if len(names) > 8 else ""
    return separator.join(names[:8]) + more
