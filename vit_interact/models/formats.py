"""Every foreign checkpoint format as one table: our parameter path, their name, what lies between.

A `Rule` reads both ways. Several names on one side and one on the other mean that the arrays are
packed along their first axis, as timm packs query, key and value into `qkv`. `{i}` is the layer.
Google's formats carry our names already, but for the aliases that older files need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Transform(NamedTuple):
    """What turns their array into ours, given the number of heads, and ours into theirs."""

    read: Callable[[np.ndarray, int], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x, heads: x, lambda x: x)
CONV = Transform(lambda x, heads: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
LINEAR = Transform(lambda x, heads: x.T, lambda x: x.T)
# A vector [D] or a table [rows, D] without the leading axes that ours has.
TOKEN = Transform(lambda x, heads: x.reshape(1, 1, -1), lambda x: x.reshape(-1))
TABLE = Transform(lambda x, heads: x[None], lambda x: x[0])
# [D, D] (out, in) and [D, H, K] or [H, K, D].
TO_HEADS = Transform(
    lambda x, heads: x.T.reshape(x.shape[1], heads, -1),
    lambda x: x.reshape(x.shape[0], -1).T,
)
TO_HEADS_BIAS = Transform(lambda x, heads: x.reshape(heads, -1), lambda x: x.reshape(-1))
FROM_HEADS = Transform(
    lambda x, heads: x.T.reshape(heads, -1, x.shape[0]),
    lambda x: x.reshape(-1, x.shape[-1]).T,
)


class Rule(NamedTuple):
    """Our path or paths, their name or names, and the transform of each array."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform


class Format(NamedTuple):
    """One way to name the parameters of a Vision Transformer.

    Attributes:
      name: what notes and messages call it.
      mark: a regular expression; a file is of the first format with a name that matches.
      rules: the table; empty where names are ours already.
      aliases: (regular expression, replacement) pairs, applied to their names in order.
      ignored: names that play no part in inference; the notes list them.
    """

    name: str
    mark: str
    rules: tuple[Rule, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = "(?!)"


def _rule(ours: str, theirs: str, transform: Transform = SAME) -> Rule:
    """One line of a table; names packed together are separated by `+`."""
    return Rule(tuple(ours.split(" + ")), tuple(theirs.split(" + ")), transform)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return _rule(f"{ours}/scale", f"{theirs}.weight"), _rule(f"{ours}/bias", f"{theirs}.bias")


def _layer(
    ours: str, theirs: str, kernel: Transform = LINEAR, bias: Transform = SAME
) -> tuple[Rule, ...]:
    def named(side: str, separator: str, leaf: str) -> str:
        return " + ".join(f"{name}{separator}{leaf}" for name in side.split(" + "))

    return (
        _rule(named(ours, "/", "kernel"), named(theirs, ".", "weight"), kernel),
        _rule(named(ours, "/", "bias"), named(theirs, ".", "bias"), bias),
    )


_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_QKV = " + ".join(f"{_ATTENTION}/{name}" for name in ("query", "key", "value"))
_MLP = f"{_BLOCK}/MlpBlock_0"
_MAP = "MAPHead_0"
_MAP_ATTENTION = f"{_MAP}/MultiHeadDotProductAttention_0"

GOOGLE = Format(
    "Google npz",
    mark=r"embedding/kernel$",
    aliases=(
        (r"^(opt/target|opt/params|target|params)/", ""),
        (r"^img/", ""),
        (r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding"),
        (r"^(Transformer/encoderblock_\d+)/MultiHeadDotProductAttention_1/",
         r"\1/MultiHeadDotProductAttention_0/"),
        (r"^(Transformer/encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
        (r"^(Transformer/encoderblock_\d+)/MlpBlock_3/", r"\1/MlpBlock_0/"),
        (r"^(probe$|(MlpBlock|LayerNorm|MultiHeadDotProductAttention)_0/)", r"MAPHead_0/\1"),
    ),
    # Training state beside the parameters; the text tower of a two-tower model.
    ignored=r"^(opt/(?!target/|params/)|txt/|params/txt/|(params/)?[tb]$|state/|step$|chrono)",
)  # fmt: skip

TIMM = Format(
    "timm",
    mark=r"^patch_embed\.proj\.weight$",
    rules=(
        *_layer("embedding", "patch_embed.proj", CONV),
        _rule("cls", "cls_token"),
        _rule("dist", "dist_token"),
        _rule("reg", "reg_token"),
        _rule("pos_embedding", "pos_embed"),
        *_norm("pre_norm", "norm_pre"),
        *_norm(f"{_BLOCK}/LayerNorm_0", "blocks.{i}.norm1"),
        *_layer(_QKV, "blocks.{i}.attn.qkv", TO_HEADS, TO_HEADS_BIAS),
        *_norm(f"{_ATTENTION}/query_norm", "blocks.{i}.attn.q_norm"),
        *_norm(f"{_ATTENTION}/key_norm", "blocks.{i}.attn.k_norm"),
        *_layer(f"{_ATTENTION}/out", "blocks.{i}.attn.proj", FROM_HEADS),
        _rule(f"{_BLOCK}/ls1", "blocks.{i}.ls1.gamma"),
        *_norm(f"{_BLOCK}/LayerNorm_1", "blocks.{i}.norm2"),
        *_layer(f"{_MLP}/Dense_0", "blocks.{i}.mlp.fc1"),
        *_layer(f"{_MLP}/Dense_0", "blocks.{i}.mlp.fc1_g + blocks.{i}.mlp.fc1_x"),
        *_layer(f"{_MLP}/Dense_1", "blocks.{i}.mlp.fc2"),
        _rule(f"{_BLOCK}/ls2", "blocks.{i}.ls2.gamma"),
        # Ours, named in timm's spirit.
        *_layer(f"{_BLOCK}/WindowHead_0/Dense_0", "blocks.{i}.window_head"),
        _rule(f"{_BLOCK}/GivenWindows_0/windows", "blocks.{i}.windows"),
        *_norm("Transformer/encoder_norm", "norm"),
        _rule(f"{_MAP}/probe", "attn_pool.latent"),
        *_layer(f"{_MAP_ATTENTION}/query", "attn_pool.q", TO_HEADS, TO_HEADS_BIAS),
        *_layer(
            f"{_MAP_ATTENTION}/key + {_MAP_ATTENTION}/value",
            "attn_pool.kv", TO_HEADS, TO_HEADS_BIAS,
        ),
        *_layer(f"{_MAP_ATTENTION}/out", "attn_pool.proj", FROM_HEADS),
        *_norm(f"{_MAP}/LayerNorm_0", "attn_pool.norm"),
        *_layer(f"{_MAP}/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
        *_layer(f"{_MAP}/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
        *_norm("pool_norm", "fc_norm"),
        *_layer("head", "head"),
        *_layer("head_dist", "head_dist"),
    ),
    # The names of Meta's own DINOv2 files.
    aliases=(
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    ignored=r"^mask_token$",
)  # fmt: skip


def _hf_attention(theirs: str) -> tuple[Rule, ...]:
    separate = (
        rule
        for name in ("query", "key", "value")
        for rule in _layer(
            f"{_ATTENTION}/{name}", f"{theirs}.attention.{name}", TO_HEADS, TO_HEADS_BIAS
        )
    )
    return (*separate, *_layer(f"{_ATTENTION}/out", f"{theirs}.output.dense", FROM_HEADS))


_HF_EMBEDDINGS = (
    *_layer("embedding", "embeddings.patch_embeddings.projection", CONV),
    _rule("cls", "embeddings.cls_token"),
    _rule("pos_embedding", "embeddings.position_embeddings"),
)
_HF_HEADS = (
    *_norm("Transformer/encoder_norm", "layernorm"),
    *_layer("head", "classifier"),
    *_layer("head_dist", "distillation_classifier"),
)

HF_DINOV2 = Format(
    "Hugging Face DINOv2",
    mark=r"(^|\.)encoder\.layer\.\d+\.layer_scale1\.lambda1$",
    rules=(
        *_HF_EMBEDDINGS,
        _rule("reg", "embeddings.register_tokens"),
        *_norm(f"{_BLOCK}/LayerNorm_0", "encoder.layer.{i}.norm1"),
        *_hf_attention("encoder.layer.{i}.attention"),
        _rule(f"{_BLOCK}/ls1", "encoder.layer.{i}.layer_scale1.lambda1"),
        *_norm(f"{_BLOCK}/LayerNorm_1", "encoder.layer.{i}.norm2"),
        *_layer(f"{_MLP}/Dense_0", "encoder.layer.{i}.mlp.fc1"),
        *_layer(f"{_MLP}/Dense_1", "encoder.layer.{i}.mlp.fc2"),
        _rule(f"{_BLOCK}/ls2", "encoder.layer.{i}.layer_scale2.lambda1"),
        *_HF_HEADS,
    ),
    aliases=(
        (r"^(dinov2|dinov2_with_registers)\.", ""),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    ),
    ignored=r"^embeddings\.mask_token$",
)

HF_VIT = Format(
    "Hugging Face ViT",
    mark=r"(^|\.)encoder\.layer\.\d+\.layernorm_before\.weight$",
    rules=(
        *_HF_EMBEDDINGS,
        _rule("dist", "embeddings.distillation_token"),
        *_norm(f"{_BLOCK}/LayerNorm_0", "encoder.layer.{i}.layernorm_before"),
        *_hf_attention("encoder.layer.{i}.attention"),
        *_norm(f"{_BLOCK}/LayerNorm_1", "encoder.layer.{i}.layernorm_after"),
        *_layer(f"{_MLP}/Dense_0", "encoder.layer.{i}.intermediate.dense"),
        *_layer(f"{_MLP}/Dense_1", "encoder.layer.{i}.output.dense"),
        *_HF_HEADS,
    ),
    aliases=((r"^(vit|deit)\.", ""), (r"^cls_classifier\.", "classifier.")),
    ignored=r"^(pooler\.dense\.|embeddings\.mask_token$)",
)

_CLIP_LAYER = "encoder.layers.{i}"
HF_CLIP = Format(
    "Hugging Face CLIP",
    mark=r"(^|\.)embeddings\.class_embedding$",
    rules=(
        *_layer("embedding", "embeddings.patch_embedding", CONV),
        _rule("cls", "embeddings.class_embedding", TOKEN),
        _rule("pos_embedding", "embeddings.position_embedding.weight", TABLE),
        *_norm("pre_norm", "pre_layrnorm"),
        *_norm(f"{_BLOCK}/LayerNorm_0", f"{_CLIP_LAYER}.layer_norm1"),
        *_layer(f"{_ATTENTION}/query", f"{_CLIP_LAYER}.self_attn.q_proj", TO_HEADS, TO_HEADS_BIAS),
        *_layer(f"{_ATTENTION}/key", f"{_CLIP_LAYER}.self_attn.k_proj", TO_HEADS, TO_HEADS_BIAS),
        *_layer(f"{_ATTENTION}/value", f"{_CLIP_LAYER}.self_attn.v_proj", TO_HEADS, TO_HEADS_BIAS),
        *_layer(f"{_ATTENTION}/out", f"{_CLIP_LAYER}.self_attn.out_proj", FROM_HEADS),
        *_norm(f"{_BLOCK}/LayerNorm_1", f"{_CLIP_LAYER}.layer_norm2"),
        *_layer(f"{_MLP}/Dense_0", f"{_CLIP_LAYER}.mlp.fc1"),
        *_layer(f"{_MLP}/Dense_1", f"{_CLIP_LAYER}.mlp.fc2"),
        *_norm("pool_norm", "post_layernorm"),
        *_layer("head", "visual_projection"),
    ),
    aliases=((r"^vision_model\.", ""),),
    ignored=r"^(text_model\.|text_projection\.|logit_scale$|(.*\.)?position_ids$)",
)

FORMATS = (GOOGLE, TIMM, HF_DINOV2, HF_VIT, HF_CLIP)


def find_format(names: list[str]) -> Format | None:
    """The format whose mark a name bears, or None."""
    for form in FORMATS:
        if any(re.search(form.mark, name) for name in names):
            return form
    return None


def is_ignored(form: Format, name: str) -> bool:
    """Whether a name of the file, or what its alias makes of it, plays no part here."""
    return bool(re.search(form.ignored, name) or re.search(form.ignored, canonical(form, name)))


def canonical(form: Format, name: str) -> str:
    """Their name as the table spells it."""
    for pattern, replacement in form.aliases:
        name = re.sub(pattern, replacement, name)
    return name


def _expand(rules: tuple[Rule, ...], depth: int) -> list[Rule]:
    """Rules with `{i}` once for each layer."""
    expanded = []
    for ours, theirs, transform in rules:
        layers = range(depth) if "{i}" in ours[0] else range(1)
        expanded += [
            Rule(
                tuple(name.replace("{i}", str(i)) for name in ours),
                tuple(name.replace("{i}", str(i)) for name in theirs),
                transform,
            )
            for i in layers
        ]
    return expanded


def _depth(names: Mapping[str, object]) -> int:
    """One more than the highest layer number in any name."""
    numbers = (re.search(r"(?:blocks\.|layers?\.|encoderblock_)(\d+)[./]", n) for n in names)
    return 1 + max((int(number.group(1)) for number in numbers if number), default=-1)


def read_names(form: Format, arrays: Arrays, heads: int) -> tuple[Arrays, list[str]]:
    """Their arrays under our paths.

    Args:
      form: the format.
      arrays: their canonical names to arrays.
      heads: attention heads `H`.

    Returns:
      Flat paths (`a/b/c`) to arrays, and the names that no rule took.
    """
    if not form.rules:
        return dict(arrays), []
    ours: Arrays = {}
    taken: set[str] = set()
    for rule in _expand(form.rules, _depth(arrays)):
        if not all(name in arrays for name in rule.theirs):
            continue
        parts = [arrays[name] for name in rule.theirs]
        if len(rule.ours) != len(parts):
            packed = parts[0] if len(parts) == 1 else np.concatenate(parts)
            parts = np.split(packed, len(rule.ours))
        taken.update(rule.theirs)
        for path, part in zip(rule.ours, parts, strict=True):
            ours[path] = rule.transform.read(part, heads)
    return ours, sorted(set(arrays) - taken)


def write_names(form: Format, arrays: Arrays) -> Arrays:
    """Our flat paths under their names, the inverse of `read_names`."""
    theirs: Arrays = {}
    left = set(arrays)
    for rule in _expand(form.rules, _depth(arrays)):
        # A second rule for the same path is another spelling, for reading only.
        if not left.issuperset(rule.ours):
            continue
        parts = [rule.transform.write(arrays[path]) for path in rule.ours]
        left.difference_update(rule.ours)
        theirs[rule.theirs[0]] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if left:
        raise ValueError(f"{form.name} has no name for {sorted(left)}")
    return theirs
