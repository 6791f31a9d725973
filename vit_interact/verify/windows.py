"""Verification (a): does a model still see when every patch attends to its window alone?"""

from __future__ import annotations

import math
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
from vit_interact.interactions.window_masks import window_area, window_mask
from vit_interact.interactions.windows import smallest_windows
from vit_interact.layout import TokenLayout
from vit_interact.verify.subject import Subject

COVERAGES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
CONTROLS = ("centred", "random", "lowest", "grid")
VARIANTS = ("layers", "staged", "shared", "data")
# Variants that are compared with boxes of the same area.
CONTROLLED = VARIANTS[:2]
# Staged windows hold this share of what is measured inside those of the stage before.
STAGE = 0.8


def measure_windows(
    subject: Subject,
    params: object,
    images: Array,
    name: str,
    coverages: Sequence[float],
    keys: Array,
    variants: Sequence[str] = VARIANTS,
    controls: Sequence[str] = CONTROLS,
    power: float | int = 1.0,
) -> dict[tuple[str, str], Int[Array, "Q L B P 4"]]:
    """All windows that belong to these images alone: `make_windows` and `staged_windows`.

    Args:
      subject: the model.
      params: its parameters.
      images: normalised `[B, h, w, 3]`.
      name: of an indicator.
      coverages: shares of a row's impact that windows hold.
      keys: a random key for each image `[B]`.
      variants: of `VARIANTS`; `data` is made elsewhere.
      controls: of `CONTROLS`, for each variant of `CONTROLLED`.
      power: rows are raised to it first.

    Returns:
      (variant, kind) to windows, as `make_windows`.
    """
    layout = subject.layout
    maps = subject.measure(params, images, (name,))[name]
    rolled = name == "rollout"
    made = make_windows(maps, layout, coverages, keys, rolled, variants, controls, power)
    if "staged" in variants:
        own = staged_windows(subject, params, images, name, coverages, power)
        made["staged", "indicator"] = own
        rows = patch_view(maps, layout) ** power
        for kind, boxes in control_windows(own, rows, layout, keys, controls).items():
            made["staged", kind] = boxes
    return made


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
    """Windows of an indicator measured once, and their controls of the same area for each query.

    Args:
      indicator: one indicator of all layers `[L, B, N, N]`.
      layout: which token is which patch.
      coverages: shares of a row's impact that windows hold.
      keys: a random key for each image `[B]`.
      rolled: whether the indicator is a rollout, whose last layer already holds all others.
      variants: of `VARIANTS`; `staged` and `data` need more than this indicator and are made
        elsewhere.
      controls: of `CONTROLS`; they follow the windows of variant `layers`.
      power: rows are raised to it first. Below 1, a window follows the bulk of what a patch
        interacts with, rather than a few peaks.

    Returns:
      (variant, kind) to windows `[Q, L, B, P, 4]`. Variant `layers`: windows of each layer from
      that layer; `shared`: one window for all layers, from their mean. Kind `indicator`, and for
      `layers` each of the controls.
    """
    rows = patch_view(indicator, layout) ** power
    made = {}
    if "layers" in variants:
        own = smallest_windows(rows, layout, tuple(coverages))
        made["layers", "indicator"] = own
        for kind, boxes in control_windows(own, rows, layout, keys, controls).items():
            made["layers", kind] = boxes
    if "shared" in variants:
        shared = _shared_windows(indicator, layout, coverages, rolled, power)
        made["shared", "indicator"] = jnp.broadcast_to(
            shared[:, None], (len(shared), len(indicator), *shared.shape[1:])
        )
    return made


def control_windows(
    own: Int[Array, "Q L B P 4"],
    rows: Float[Array, "L B P P"],
    layout: TokenLayout,
    keys: Array,
    controls: Sequence[str] = CONTROLS,
) -> dict[str, Int[Array, "Q L B P 4"]]:
    """Boxes of the same area for each query as given windows, made without what made those.

    Args:
      own: the windows to compare with.
      rows: the patch-to-patch indicator, for `lowest` only.
      layout: which token is which patch.
      keys: a random key for each image `[B]`.
      controls: of `CONTROLS`.
    """
    each = jax.vmap(lambda w, key: random_windows(w, layout, key), in_axes=(2, 0), out_axes=2)
    make = {
        "centred": lambda: centred_windows(own, layout),
        "random": lambda: each(own, keys),
        "lowest": lambda: jnp.stack([lowest_windows(rows, one, layout) for one in own]),
        "grid": lambda: grid_windows(own, layout),
    }
    return {kind: make[kind]() for kind in controls}


def stages_of(coverage: float) -> tuple[int, float]:
    """How staged windows reach a coverage: whole stages of `STAGE`, then a last one of the rest.

    Returns:
      The number of whole stages and the share that the last one holds, in [`STAGE`, 1].
    """
    whole = max(0, math.ceil(math.log(coverage) / math.log(STAGE) - 1e-9) - 1)
    return whole, min(1.0, coverage / STAGE**whole)


def staged_windows(
    subject: Subject,
    params: object,
    images: Array,
    name: str,
    coverages: Sequence[float],
    power: float | int = 1.0,
) -> Int[Array, "Q L B P 4"]:
    """Windows of each layer, by an indicator that is measured again inside the windows so far.

    Restricting all layers at once changes what each of them reads: what an indicator says of the
    whole model no longer holds inside small windows. So they shrink in stages. Each measures the
    model inside the windows of the stage before and keeps `STAGE` of every row; the last keeps
    what is left of the coverage, which is the product of all shares. Gradients stay those of the
    class that is predicted for the whole image.

    Args:
      subject: a model with `measure_inside`.
      params: its parameters.
      images: normalised `[B, h, w, 3]`.
      name: of an indicator.
      coverages: shares in (0, 1].
      power: as for `make_windows`.
    """
    assert subject.measure_inside is not None
    measure_inside, layout = subject.measure_inside, subject.layout
    classes = subject.apply(params, images, None).argmax(-1)
    plan = [stages_of(coverage) for coverage in coverages]
    shares = (STAGE, *(rest for _, rest in plan))

    def stage(inside: Array, _: None) -> tuple[Array, Array]:
        masks = [window_mask(layer, layout) for layer in inside]
        maps = measure_inside(params, images, (name,), masks, classes)[name]
        boxes = smallest_windows(patch_view(maps, layout) ** power, layout, shares)
        return boxes[0], boxes[1:]

    whole = jnp.array([0, 0, layout.rows, layout.cols], jnp.int32)
    whole = jnp.broadcast_to(whole, (subject.depth, len(images), layout.num_patches, 4))
    # Every stage makes the last windows of every coverage, which costs next to nothing beside the
    # measurement: so all stages are one program.
    _, made = jax.lax.scan(stage, whole, None, 1 + max(number for number, _ in plan))
    return jnp.stack([made[number, q] for q, (number, _) in enumerate(plan)])


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
