"""How much arithmetic a step is, and how much the devices could do."""

from __future__ import annotations

import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from vit_interact.models.config import ViTConfig
from vit_interact.train.sharding import path_of

# Dense bf16 peak of one device in FLOP/s, from the makers' data sheets.
_PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def forward_flops(config: ViTConfig, train: bool = False) -> float:
    """FLOPs of one image's forward pass, multiplications and additions apart.

    Matrix products only: embedding, projections, attention, MLP, window heads and head.

    Args:
      config: the architecture.
      train: whether the last block makes only what logits are made of, as in training.
    """
    tokens, width = config.layout.num_tokens, config.width
    ph, pw = config.patch_size
    embedding = config.layout.num_patches * 3 * ph * pw * width
    hidden = config.mlp_dim * (3 if config.swiglu else 2)
    windows = config.windows
    predicts = windows is not None and windows.kind == "predicted"
    last = config.tokens_read if train and not config.scan else None
    attending = tokens
    # What predicts windows does so for all patches, and they attend.
    if last is not None and not (windows and predicts and windows.has(config.depth - 1)):
        attending = last

    def block(attending: int, made: int) -> int:
        sides = width * (attending + 2 * tokens)  # queries, keys and values
        return width * (sides + 2 * attending * tokens + made * (width + hidden))

    blocks = (config.depth - 1) * block(tokens, tokens)
    blocks += block(attending, tokens if last is None else last)
    predicted = 0
    if windows is not None and predicts:
        layers = sum(windows.has(layer) for layer in range(config.depth))
        predicted = layers * config.layout.num_patches * width * 4 * windows.groups
    head = width * config.num_classes * (2 if config.pool == "cls_gap" else 1)
    return 2.0 * (embedding + blocks + predicted + head)


def peak_flops(count: int) -> tuple[float, str]:
    """Peak of so many devices together in FLOP/s, and where the figure is from.

    A device that is not in the table is measured by a matrix product.
    """
    kind = jax.devices()[0].device_kind
    for name in sorted(_PEAKS, key=len, reverse=True):
        if name.lower() in kind.lower():
            return _PEAKS[name] * count, f"bf16 data sheet of {name}"
    # Simulated devices share the processor.
    sharing = 1 if jax.default_backend() == "cpu" else count
    return _measured_peak() * sharing, "measured by a float32 matrix product"


@functools.cache
def _measured_peak(size: int = 2048, turns: int = 3) -> float:
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def step_flops(config: ViTConfig, frozen: Any = None) -> float:
    """FLOPs of one image's training step: the forward pass, and twice that for the backward pass.

    Blocks below the lowest one with a trained parameter have no backward pass. Recomputation under
    `remat` is not counted: it is not asked for by the model.

    Args:
      config: the architecture.
      frozen: tree of which parameters stay, or None.
    """
    forward = forward_flops(config, train=True)
    if frozen is None:
        return 3 * forward
    lowest = config.depth
    for keys, still in jax.tree_util.tree_leaves_with_path(frozen):
        path = path_of(keys)
        if still or path.startswith(("head", "Transformer/encoder_norm", "pool_norm", "MAPHead")):
            continue
        block = re.match(r"Transformer/encoderblock_(\d+)/", path)
        lowest = min(lowest, int(block.group(1)) if block else 0)
    return forward * (1 + 2 * (1 - lowest / config.depth))
