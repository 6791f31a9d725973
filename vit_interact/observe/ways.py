"""Which way `vi.measure` takes: all queries at once, blocks of them, or Pallas kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_interact.interactions.head_terms import TERMS
from vit_interact.models.attend import (
    WEIGHT_BYTES,
    QueryBlocks,
    Tiles,
    blocks_over_heads,
    suitable_blocks,
)
from vit_interact.models.cpu import can_split_images, on_cpu
from vit_interact.models.fused import cudnn_knows
from vit_interact.models.gpu import has_triton
from vit_interact.models.vit import ViT

_KERNELS_PAY = {"attention", "dispersion", "gradient", "edge", "leave_one_out", "rollout"}


# On a CPU a few heads at a time are faster, or as fast in less memory: everything from so many
# tokens on, and with fewer only this, of one image or of so many that all heads' weights take more
# than that (docs/kernels.md).
_MANY_TOKENS = 512
_HEADS_PAY = {"leave_one_out"}
_MANY_BYTES = 2 * WEIGHT_BYTES
# Bytes of the hidden tokens, in float32, of images worked on together there: products of so many
# rows are as fast as they get, and what is made of more does not stay in the cache. Images of many
# tokens have enough rows sooner (docs/kernels.md).
_BYTES_TOGETHER = 5_000_000
_ROWS_TOGETHER = 2304


def images_together(model: Any, images: int, keep: Any, mask: Any, score: Any) -> int:
    """How many images of a batch to work on at a time; all of them but on one CPU.

    As many as fit, or down to half of that where then fewer are worked on twice (`map_images`). A
    score that is a function gets the logits of all images, and a mask may be of all.
    """
    if not isinstance(model, ViT) or not can_split_images() or not (mask is None and score is None):
        return images
    tokens = _count_tokens(model, keep)
    most = _BYTES_TOGETHER // (4 * tokens * model.config.width)
    if tokens >= _MANY_TOKENS:
        most = min(most, _ROWS_TOGETHER // tokens)
    most = max(1, most)
    if images <= most:
        return images
    return min(range(most, most // 2, -1), key=lambda count: -images % count)


def query_blocks(
    model: Any, images: int, keep: Any, block: int | None, names: Sequence[str]
) -> QueryBlocks | None:
    """What `block` asks for; None to work on all queries of a layer at once."""
    if not isinstance(model, ViT):
        if block is not None:
            raise ValueError("block needs vit_interact's ViT: other models work on all queries")
        return None
    config, tokens = model.config, _count_tokens(model, keep)
    shape = (images, config.heads, tokens, tokens)
    whole = suitable_blocks(*shape) if block is None else QueryBlocks(block)
    if whole is not None and whole.images is None and whole.size >= tokens:
        whole = None
    sums = on_cpu() and config.windows is None and set(names) <= set(TERMS)
    many_or_one = images == 1 or 4 * math.prod(shape) > _MANY_BYTES
    pay = tokens >= _MANY_TOKENS or (many_or_one and _HEADS_PAY & set(names))
    if not sums or (block is None and not pay):
        return whole
    blocks = blocks_over_heads(*shape)
    return blocks if block is None else dataclasses.replace(blocks, size=block)


def _count_tokens(model: ViT, keep: Any) -> int:
    config = model.config
    return config.layout.num_tokens if keep is None else config.prefix + keep.shape[1]


def tiles(
    model: Any, names: Sequence[str], mask: Any, block: int | None, kernel: str | None
) -> Tiles | None:
    """Asks for Pallas kernels, or says why they cannot serve; None for XLA."""
    if kernel not in (None, "xla", "pallas"):
        raise ValueError(f"kernel={kernel!r}: expected None, 'xla' or 'pallas'")
    ours = isinstance(model, ViT) and model.config.windows is None
    if kernel == "pallas":
        if not ours:
            raise ValueError("kernel='pallas' needs vit_interact's ViT, without predicted windows")
        if mask is not None or block is not None:
            raise ValueError("kernel='pallas' takes neither mask nor block")
        return Tiles()
    # Where a GPU was seen to be faster and right with them (docs/kernels.md). XLA does not split
    # them over devices. What cuDNN knows is NVIDIA's, 16-bit and not too old for Triton.
    pay = (
        kernel is None and ours and mask is None and block is None
        and set(names) <= _KERNELS_PAY and jax.device_count() == 1
        and cudnn_knows(jnp.dtype(model.config.dtype), model.config.head_dim) and has_triton()
    )  # fmt: skip
    return Tiles() if pay else None
