"""A Vision Transformer in plain NumPy float64, and its parameters under Google's names.

Written from the published description, one image and one head at a time, to check the loader for
augreg and big_vision files, for which there is no peer that can be installed.
"""

import math

import numpy as np


def random_params(rng, *, width=16, heads=2, depth=2, mlp=24, patch=4, rows=16, classes=3,
                  cls=True, map_head=False, positions=True):  # fmt: skip
    """big_vision's parameters, all random."""

    def array(*shape, scale=None):
        return rng.normal(size=shape) * (scale or 1 / math.sqrt(np.prod(shape[:-1]) or 1))

    def norm():
        return {"scale": 1 + array(width, scale=0.2), "bias": array(width, scale=0.2)}

    def dense(*shape, bias):
        return {"kernel": array(*shape), "bias": array(*bias, scale=0.2)}

    def attention():
        head = width // heads
        inner = {
            n: dense(width, heads, head, bias=(heads, head)) for n in ("query", "key", "value")
        }
        return {**inner, "out": dense(heads, head, width, bias=(width,))}

    def mlp_block():
        return {
            "Dense_0": dense(width, mlp, bias=(mlp,)),
            "Dense_1": dense(mlp, width, bias=(width,)),
        }

    params = {
        "embedding": dense(patch, patch, 3, width, bias=(width,)),
        "Transformer": {"encoder_norm": norm()},
        "head": dense(width, classes, bias=(classes,)),
    }
    for i in range(depth):
        params["Transformer"][f"encoderblock_{i}"] = {
            "LayerNorm_0": norm(), "LayerNorm_1": norm(), "MlpBlock_0": mlp_block(),
            "MultiHeadDotProductAttention_0": attention(),
        }  # fmt: skip
    if positions:
        params["pos_embedding"] = array(1, rows, width, scale=0.4)
    if cls:
        params["cls"] = array(1, 1, width, scale=0.4)
    if map_head:
        params["MAPHead_0"] = {
            "probe": array(1, 1, width, scale=0.5), "LayerNorm_0": norm(),
            "MlpBlock_0": mlp_block(), "MultiHeadDotProductAttention_0": attention(),
        }  # fmt: skip
    return params


def flatten(tree, prefix=""):
    """`a/b/c` to arrays."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = np.asarray(value, np.float32)
    return flat


def _norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _mlp(p, x):
    x = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def _attention(p, queries, tokens):
    out = np.zeros_like(queries) + p["out"]["bias"]
    heads, head_width, _ = p["out"]["kernel"].shape
    for h in range(heads):
        q, k, v = (
            x @ p[name]["kernel"][:, h] + p[name]["bias"][h]
            for name, x in (("query", queries), ("key", tokens), ("value", tokens))
        )
        logits = np.exp(q @ k.T / math.sqrt(head_width))
        out = out + (logits / logits.sum(-1, keepdims=True)) @ v @ p["out"]["kernel"][h]
    return out


def forward(params, image, *, pool, cls_position=False, positions=None):
    """Logits of one image `[h, w, 3]`; `pool` is `cls`, `gap` or `map`."""
    kernel = params["embedding"]["kernel"]
    patch = kernel.shape[0]
    tokens = [
        np.einsum("hwc,hwcd->d", image[y : y + patch, x : x + patch], kernel)
        for y in range(0, image.shape[0], patch)
        for x in range(0, image.shape[1], patch)
    ]
    x = np.stack(tokens) + params["embedding"]["bias"]
    pos = params["pos_embedding"][0] if positions is None else positions
    if "cls" in params:
        token = params["cls"][0]
        x = np.concatenate([token, x]) + pos if cls_position else np.concatenate([token, x + pos])
    else:
        x = x + pos
    encoder = params["Transformer"]
    for i in range(len(encoder) - 1):
        block = encoder[f"encoderblock_{i}"]
        y = _norm(block["LayerNorm_0"], x)
        x = x + _attention(block["MultiHeadDotProductAttention_0"], y, y)
        x = x + _mlp(block["MlpBlock_0"], _norm(block["LayerNorm_1"], x))
    x = _norm(encoder["encoder_norm"], x)
    if pool == "map":
        head = params["MAPHead_0"]
        x = _attention(head["MultiHeadDotProductAttention_0"], head["probe"][0], x)
        x = x + _mlp(head["MlpBlock_0"], _norm(head["LayerNorm_0"], x))
    pooled = x.mean(0) if pool == "gap" else x[0]
    return pooled @ params["head"]["kernel"] + params["head"]["bias"]
