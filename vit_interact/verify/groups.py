"""What masking the strongest, weakest or random interactions of all layers does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.layout import TokenLayout
from vit_interact.models.vit import Images, ViT
from vit_interact.verify.edges import Keys, check_known, check_ours, image_numbers

SHARES = (0.01, 0.05, 0.1, 0.2)
# What `edge_places` multiplies an indicator by; times 0, only its random order is left.
_FACTORS = {"top": -1.0, "bottom": 1.0, "random": 0.0}
KINDS = tuple(_FACTORS)


class GroupTest(NamedTuple):
    """What masking a share of the patch-to-patch edges does; keys are (which, share).

    Attributes:
      unmasked: class predicted without a mask `[B]`.
      change: change of that class's logit `[B]`, in logits.
      predictions: class predicted with the mask `[B]`.
    """

    unmasked: np.ndarray
    change: dict[tuple[str, float], np.ndarray]
    predictions: dict[tuple[str, float], np.ndarray]


def group_test(
    model: ViT,
    params: Mapping[str, Any],
    images: Images,
    indicator_maps: Float[Array, "L B N N"] | Float[np.ndarray, "L B N N"],
    shares: Sequence[float] = SHARES,
    which: Sequence[str] = KINDS,
    seed: int = 0,
    image_keys: Keys = None,
) -> GroupTest:
    """Masks a share of the patch-to-patch edges (`i != j`) of every layer at once, in float32.

    `round(share * P * (P - 1))` edges of each image and layer are masked: those of the highest
    (`top`) or lowest (`bottom`) raw indicator, or random ones as a control. Equal values, such as
    a layer of zeros, go in random order. One compilation serves all shares and kinds.

    Args:
      model: our `ViT`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`, all run at once.
      indicator_maps: one indicator of all layers, from `vi.measure`.
      shares: of patch-to-patch edges, 0 to 1.
      which: of `top`, `bottom`, `random`.
      seed: of random edges and of the order of equal values.
      image_keys: a number of each image that randomness depends on; None is its place.

    Raises:
      ValueError: for a model that is not our `ViT`, maps that do not fit, or an unknown option.
    """
    check_ours(model)
    check_known(which, _FACTORS)
    layout, patches = model.config.layout, model.config.layout.num_patches
    expected = (model.config.depth, len(images), layout.num_tokens, layout.num_tokens)
    if indicator_maps.shape != expected:
        raise ValueError(f"indicator_maps have shape {indicator_maps.shape}; expected {expected}")
    if not which or any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares={shares}, which={which}: expected 0 to 1, and at least one kind")
    plain = ViT(dataclasses.replace(model.config, dtype="float32"))
    keys = jnp.asarray(image_numbers(image_keys, len(images)), jnp.uint32)
    values = jnp.asarray(indicator_maps)[:, :, layout.prefix :, layout.prefix :]
    places = {kind: edge_places(values, keys, seed, _FACTORS[kind]) for kind in which}

    def run(kind: str, share: float) -> np.ndarray:
        count = round(share * patches * (patches - 1))
        return np.asarray(_run_masked(plain, params, jnp.asarray(images), places[kind], count))

    # Without a mask is a mask of nothing through the same program: a share of 0 changes exactly 0.
    base = run(which[0], 0.0)
    rows, unmasked = np.arange(len(images)), base.argmax(-1)
    logits = {(kind, share): run(kind, share) for kind in which for share in shares}
    change = {cut: (each - base)[rows, unmasked] for cut, each in logits.items()}
    return GroupTest(unmasked, change, {cut: each.argmax(-1) for cut, each in logits.items()})


@jax.jit
def edge_places(
    values: Float[Array, "L B P P"], keys: Array, seed: int | Array, factor: float | Array
) -> Int[Array, "L B P P"]:
    """Place of each patch-to-patch edge in ascending `factor * values`; self edges come last.

    Equal values are in an order that is random for each seed, image key and layer.
    """
    itself = jnp.eye(values.shape[-1], dtype=bool)
    flat = jnp.where(itself, jnp.inf, factor * values).reshape(*values.shape[:2], -1)

    def draw(key: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), key)
        return jax.random.uniform(key, (len(flat), flat.shape[-1]))

    order = jnp.lexsort((jax.vmap(draw, out_axes=1)(keys), flat), axis=-1)
    return jnp.argsort(order, axis=-1).reshape(values.shape).astype(jnp.int32)


def edge_masks(
    places: Int[Array, "L B P P"], count: int | Array, layout: TokenLayout
) -> list[Bool[Array, "B N N"]]:
    """For each layer True = attend: all but the first `count` patch-to-patch edges."""
    before = (layout.prefix, 0)
    return list(~jnp.pad(places < count, ((0, 0), (0, 0), before, before)))


@functools.partial(jax.jit, static_argnames="model")
def _run_masked(model: ViT, params: Any, images: Array, places: Array, count: Any) -> Array:
    apply: Any = model.apply
    return apply({"params": params}, images, mask=edge_masks(places, count, model.config.layout))
