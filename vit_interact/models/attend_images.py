"""Attention of some images of a batch at a time, for XLA's CPU.

Products of several images at once are slower there than those of one with many rows, and what is
made of a few images stays in the cache (docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vit_interact.models.blocks import map_images


def images_apart(at_a_time: int | None, inputs: tuple[Any, ...]) -> int | None:
    """How many images to work on together; None where that is all of them, or there is a bias."""
    query, bias = inputs[0], inputs[3]
    if at_a_time is None or bias is not None or math.prod(query.shape[:-3]) <= at_a_time:
        return None
    return at_a_time


def over_images(
    work: Callable[..., Any],
    at_a_time: int,
    inputs: tuple[Any, ...],
    *rows: Any,
) -> Any:
    """What `work` gives for all images, from some at a time.

    Args:
      work: of inputs and rows of some images; what it gives has them in front.
      at_a_time: images worked on together, of `images_apart`.
      inputs: as `attend.attend_in_blocks` takes them, without a bias.
      *rows: arrays `[*B, N, H, K]`, as gradients and outputs are, or trees of some; None for none.
    """
    query, key, value, _, mask, out_kernel = inputs
    batch = query.shape[:-3]
    own = None
    if mask is not None and math.prod(mask.shape[:-3]) > 1:
        own = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    elif mask is not None:
        mask = mask.reshape(mask.shape[-3:])  # one for all

    def flat(array: Array | None) -> Array | None:
        return None if array is None else array.reshape(-1, *array.shape[-3:])

    leaves, form = jax.tree.flatten(rows)

    def some(q: Array, k: Array, v: Array, own: Array | None, *leaves: Array) -> Any:
        inputs = (q, k, v, None, mask if own is None else own, out_kernel)
        return work(inputs, *jax.tree.unflatten(form, leaves))

    found = map_images(some, at_a_time, *map(flat, (query, key, value, own, *leaves)))
    return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), found)
