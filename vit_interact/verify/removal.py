"""Verification (b): are patches that an indicator calls indiscriminative really not needed?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_interact.interactions.removal import received_impact, removal_order
from vit_interact.interactions.views import combine_layers
from vit_interact.layout import TokenLayout
from vit_interact.verify.subject import Subject

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
INTERVENTIONS = ("drop", "mask", "zero")
ORDERS = ("lowest", "patches", "highest", "staged")
RANDOM_ORDERS = 3
# Staged orders measure again whenever 0.6 of the patches are left, down to an eighth of all.
_STAGE, _LAST_STAGE = 0.6, 1 / 8


def indicator_orders(
    indicator: Float[Array, "L B N N"], layout: TokenLayout, rolled: bool = False
) -> dict[str, Int[Array, "B P"]]:
    """Orders of removal by received impact, of the mean over layers.

    Args:
      indicator: one indicator of all layers.
      layout: which token is which patch.
      rolled: whether it is a rollout, whose last layer already holds all others.

    Returns:
      `lowest`: least impact first, rows of prefix tokens included; `patches`: without those rows;
      `highest`: greatest impact first, the control that should hurt most.
    """
    together = indicator[-1] if rolled else combine_layers(indicator, layout)
    impact = received_impact(together, layout)
    return {
        "lowest": removal_order(impact),
        "patches": removal_order(received_impact(together, layout, include_prefix=False)),
        "highest": removal_order(-impact),
    }


def control_orders(
    attention: Float[Array, "L B N N"], subject: Subject, keys: Array
) -> dict[str, Int[Array, "B P"]]:
    """Orders that know nothing of interactions.

    Args:
      attention: mean attention weights of all layers.
      subject: the model.
      keys: a random key for each image `[B]`.

    Returns:
      `random0` ... `random2`; with a class token also `class_attention`, least attended first by
      the mean over layers of the class token's row, and `class_attention_last` by the last layer
      alone (EViT's criterion).
    """
    prefix, patches = subject.layout.prefix, subject.layout.num_patches
    orders = {}
    for number in range(RANDOM_ORDERS):
        own = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(keys)
        orders[f"random{number}"] = jax.vmap(lambda key: jax.random.permutation(key, patches))(own)
    if subject.class_token:
        row = attention[:, :, 0, prefix:]
        orders["class_attention"] = removal_order(row.mean(axis=0))
        orders["class_attention_last"] = removal_order(row[-1])
    return orders


def staged_order(
    impact: Callable[[Int[Array, "B K"]], Float[Array, "B K"]],
    batch: int,
    patches: int,
    sizes: Sequence[int] | None = None,
) -> Int[Array, "B P"]:
    """Order of removal by an impact that is measured again, several times, on what is left.

    What a patch gives to others depends on which others are there: of two patches that carry the
    same evidence, both look needed, or both needless, until one is gone.

    Args:
      impact: maps the numbers of the patches that are there to the impact of each.
      batch: images.
      patches: of the whole grid.
      sizes: how many patches are there at each measurement, all of them first; None: `stage_sizes`.

    Returns:
      Least impact first; what a later measurement sees goes after all that it does not see.
    """
    place = jnp.zeros((batch, patches), jnp.int32)
    update = jax.vmap(lambda one, where, value: one.at[where].set(value))
    for left in sizes or stage_sizes(patches):
        keep = kept_patches(jnp.argsort(place, axis=-1), left)
        rank = jnp.argsort(removal_order(impact(keep)), axis=-1).astype(jnp.int32)
        place = update(place, keep, patches - left + rank)
    return jnp.argsort(place, axis=-1).astype(jnp.int32)


def stage_sizes(patches: int) -> list[int]:
    """How many patches are there at each measurement of a staged order."""
    sizes, left = [], patches
    while left >= max(1, patches * _LAST_STAGE):
        sizes.append(left)
        left = math.floor(left * _STAGE)
    return sizes


def staged_by_indicator(
    subject: Subject,
    params: object,
    images: Array,
    name: str,
    sizes: Sequence[int] | None = None,
) -> Int[Array, "B P"]:
    """`staged_order` by received impact without rows of prefix tokens, of the mean over layers.

    Gradients stay those of the class that is predicted for the whole image.
    """

    def impact(maps: Float[Array, "L B n n"], layout: TokenLayout) -> Float[Array, "B K"]:
        together = maps[-1] if name == "rollout" else combine_layers(maps, layout)
        return received_impact(together, layout, include_prefix=False)

    return _staged(subject, params, images, name, impact, sizes)


def staged_by_class_attention(subject: Subject, params: object, images: Array) -> Int[Array, "B P"]:
    """The control of `staged_by_indicator`: the class token's attention, mean over layers."""

    def impact(maps: Float[Array, "L B n n"], layout: TokenLayout) -> Float[Array, "B K"]:
        return maps[:, :, 0, layout.prefix :].mean(axis=0)

    return _staged(subject, params, images, "attention", impact)


def _staged(
    subject: Subject,
    params: object,
    images: Array,
    name: str,
    impact: Callable[..., Array],
    sizes: Sequence[int] | None = None,
) -> Int[Array, "B P"]:
    assert subject.measure_kept is not None
    measure_kept, prefix = subject.measure_kept, subject.layout.prefix
    classes = subject.apply(params, images, None).argmax(-1)

    def measured(keep: Array) -> Array:
        maps = measure_kept(params, images, (name,), keep, classes)[name]
        return impact(maps, TokenLayout(rows=1, cols=keep.shape[1], prefix=prefix))

    return staged_order(measured, len(images), subject.layout.num_patches, sizes)


def patches_left(share: float, layout: TokenLayout) -> int:
    """How many patches stay when a share is removed: `P - floor(share * P)`."""
    return layout.num_patches - math.floor(share * layout.num_patches + 1e-9)


def kept_patches(order: Int[Array, "B P"], count: int) -> Int[Array, "B K"]:
    """The last `count` of each order, in the order of the grid."""
    return jnp.sort(order[:, order.shape[-1] - count :], axis=-1)


def hidden_patches(order: Int[Array, "B P"], count: Array | int) -> Bool[Array, "B P"]:
    """True for patches that are removed when `count` stay."""
    rank = jnp.argsort(order, axis=-1)
    return rank < order.shape[-1] - count


def apply_mask(
    subject: Subject, params: object, images: Array, hidden: Bool[Array, "B P"]
) -> Float[Array, "B classes"]:
    """Logits when no token attends to hidden patches, in any layer."""
    seen = jnp.pad(~hidden, ((0, 0), (subject.layout.prefix, 0)), constant_values=True)
    tokens = subject.layout.num_tokens
    mask = jnp.broadcast_to(seen[:, None], (len(seen), tokens, tokens))
    return subject.apply(params, images, [mask] * subject.depth)


def apply_zero(
    subject: Subject, params: object, images: Array, hidden: Bool[Array, "B P"]
) -> Float[Array, "B classes"]:
    """Logits when hidden patches are grey: normalised pixels at 0, the mean of the data."""
    rows, cols = subject.layout.rows, subject.layout.cols
    cells = hidden.reshape(-1, rows, cols)
    height, width = images.shape[1] // rows, images.shape[2] // cols
    pixels = jnp.repeat(jnp.repeat(cells, height, axis=1), width, axis=2)
    return subject.apply(params, jnp.where(pixels[..., None], 0, images), None)
