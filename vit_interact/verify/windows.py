"""Verification (a): does a model still see when every patch attends to its window alone?"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_interact.interactions.controls import (
    centred_windows,
    grid_windows,
    lowest_windows,
    random_windows,
)
from vit_interact.interactions.views import combine_layers, patch_view
from vit_interact.interactions.windows import smallest_windows, window_area, window_mask
from vit_interact.layout import TokenLayout
from vit_interact.verify.subject import Subject

COVERAGES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
CONTROLS = ("centred", "random", "lowest", "grid")
VARIANTS = ("layers", "shared", "data")


def make_windows(
    indicator: Float[Array, "L B N N"],
    layout: TokenLayout,
    coverages: Sequence[float],
    keys: Array,
    rolled: bool = False,
    variants: Sequence[str] = VARIANTS,
    controls: Sequence[str] = CONTROLS,
    power: float | int = 1.0,
) -> dict[tuple[str, str], Int[Array, "Q L B P 4"]]:
    """Windows of an indicator, and their controls of the same area for each query.

    Args:
      indicator: one indicator of all layers `[L, B, N, N]`.
      layout: which token is which patch.
      coverages: shares of a row's impact that windows hold.
      keys: a random key for each image `[B]`.
      rolled: whether the indicator is a rollout, whose last layer already holds all others.
      variants: of `VARIANTS`; `data` needs more than these images and is made elsewhere.
      controls: of `CONTROLS`; they follow the windows of variant `layers`.
      power: rows are raised to it first. Below 1, a window follows the bulk of what a patch
        interacts with, rather than a few peaks.

    Returns:
      (variant, kind) to windows `[Q, L, B, P, 4]`. Variant `layers`: windows of each layer from
      that layer; `shared`: one window for all layers, from their mean. Kind `indicator`, and for
      `layers` each of the controls.
    """
    rows = patch_view(indicator, layout) ** power
    own = smallest_windows(rows, layout, tuple(coverages))
    each = jax.vmap(lambda w, key: random_windows(w, layout, key), in_axes=(2, 0), out_axes=2)
    make = {
        "indicator": lambda: own,
        "centred": lambda: centred_windows(own, layout),
        "random": lambda: each(own, keys),
        "lowest": lambda: jnp.stack([lowest_windows(rows, one, layout) for one in own]),
        "grid": lambda: grid_windows(own, layout),
    }
    made = {}
    if "layers" in variants:
        made = {("layers", kind): make[kind]() for kind in ("indicator", *controls)}
    if "shared" in variants:
        made["shared", "indicator"] = jnp.broadcast_to(
            _shared_windows(indicator, layout, coverages, rolled, power)[:, None], own.shape
        )
    return made


def _shared_windows(
    indicator: Float[Array, "L B N N"],
    layout: TokenLayout,
    coverages: Sequence[float],
    rolled: bool,
    power: float | int,
) -> Int[Array, "Q B P 4"]:
    together = indicator[-1] if rolled else combine_layers(indicator, layout)
    return smallest_windows(patch_view(together, layout) ** power, layout, tuple(coverages))


def apply_windows(
    subject: Subject, params: object, images: Array, windows: Int[Array, "L B P 4"]
) -> tuple[Float[Array, "B classes"], Float[Array, " B"]]:
    """Logits when each layer's patches attend inside their windows, and the windows' mean area.

    Prefix tokens see and are seen by all.

    Returns:
      Logits, and for each image the area as a share of the grid, over queries and over the layers
      whose patch rows can reach the logits (`Subject.reaching`).
    """
    masks = [window_mask(layer, subject.layout) for layer in windows]
    reaching = windows[jnp.asarray(subject.reaching)]
    area = window_area(reaching, subject.layout).mean(axis=(0, -1))
    return subject.apply(params, images, masks), area


def attention_flops_share(area: float, layout: TokenLayout) -> float:
    """Share of dense attention's FLOPs that a window-aware kernel needs at a mean area.

    Only pairs (query, key) inside windows are multiplied; prefix tokens keep all of theirs.
    """
    pairs = area * layout.num_patches**2 + layout.num_tokens**2 - layout.num_patches**2
    return pairs / layout.num_tokens**2
