"""What a survey counts: the quantities of one batch, and the statistics they are pooled into."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.interactions.fields import responsive_field
from vit_interact.interactions.indicators import NEEDS, check_name, roll
from vit_interact.interactions.statistics import Statistics
from vit_interact.interactions.views import patch_view
from vit_interact.interactions.window_masks import window_area
from vit_interact.interactions.windows import smallest_windows
from vit_interact.layout import TokenLayout
from vit_interact.models.attend import Attended
from vit_interact.models.attention import Taps
from vit_interact.models.vit import Images, ViT
from vit_interact.observe.maps import Maps, needs_backward
from vit_interact.observe.probe import class_score, probe

BINS = 40
"""Bins of every histogram between its lowest and highest edge."""

FAINTEST = 1e-4
"""Lowest edge of the values, as 1 for a row that takes the same from every patch."""

MOST_PAIRS = 1600
"""Pairs of patches whose values are counted: with int32 counts, 1.3 million images of every layer
fit, about those of ImageNet; and the cost stays far below that of the forward pass."""


class Quantity(NamedTuple):
    """What one quantity is.

    Attributes:
      dims: its dimensions; pooled over images, and over patches where they are not among them.
      unit: its unit.
      what: in words.
      low: lowest edge of its histogram; None for no histogram.
      high: highest edge.
      log: whether edges are evenly spaced in the logarithm.
    """

    dims: tuple[str, ...]
    unit: str
    what: str
    low: float | None = None
    high: float = 1.0
    log: bool = False

    @property
    def edges(self) -> np.ndarray | None:
        """Edges of its histogram."""
        if self.low is None:
            return None
        return (np.geomspace if self.log else np.linspace)(self.low, self.high, BINS + 1)


@dataclasses.dataclass(frozen=True)
class Design:
    """What to survey. Hashable, so that it can be static under `jit`.

    Attributes:
      layout: the grid of patches and the prefix tokens.
      depth: layers `L`.
      heads: heads `H`.
      indicators: names of `interactions.INDICATORS`.
      coverages: of windows; none leaves windows out.
      values: whether entries of the indicators are counted; False in stores from before they were.
    """

    layout: TokenLayout
    depth: int
    heads: int
    indicators: tuple[str, ...] = ("attention",)
    coverages: tuple[float, ...] = (0.9,)
    values: bool = True

    def __post_init__(self) -> None:
        for name in self.indicators:
            check_name(name)
        if not self.indicators:
            raise ValueError("a survey needs at least one indicator")

    @classmethod
    def of(cls, model: ViT, **choices: Any) -> Design:
        """The design for our `ViT`.

        Raises:
          ValueError: for an unknown indicator, or one of gradients when the model has no classes.
        """
        config = model.config
        for name in choices.get("indicators", ()):
            if "output_grad" in NEEDS.get(name, ()) and not config.has_classes:
                raise ValueError(f"{name} is of the gradient of a class; these weights have none")
        return cls(config.layout, config.depth, config.heads, **choices)

    def check_count(self, images: int) -> None:
        """Refuses more images than int32 counts hold.

        Raises:
          ValueError: with the number that they hold.
        """
        entries = max(self.layout.num_patches, len(value_pairs(self.layout)) * self.values)
        most = (2**31 - 1) // entries
        if images > most:
            raise ValueError(
                f"a survey of a grid of {self.layout.rows}x{self.layout.cols} holds at most "
                f"{most:,} images, got {images:,}"
            )

    def quantities(self) -> dict[str, Quantity]:
        """All that is counted, by name: `attention_distance`, and `INDICATOR_what`."""
        rows, cols = self.layout.rows, self.layout.cols
        far = float(np.hypot(rows - 1, cols - 1)) or 1.0
        layer, window = ("layer",), ("coverage", "layer")
        each = {
            "kernel": Quantity(
                ("layer", "row_offset", "col_offset"),
                "share of the row",
                "impact of the patch at this offset from the query, mean over queries",
            ),
            "tendency_row": Quantity(
                layer, "patches", "mean displacement in rows", 1.0 - rows, rows - 1.0
            ),
            "tendency_col": Quantity(
                layer, "patches", "mean displacement in columns", 1.0 - cols, cols - 1.0
            ),
            "tendency": Quantity(layer, "patches", "length of the mean displacement", 0.0, far),
            "spread": Quantity(layer, "patches", "root mean square distance", 0.0, far),
            "eccentricity": Quantity(layer, "1", "eccentricity of the field", 0.0, 1.0),
            "entropy": Quantity(layer, "share of log P", "entropy of the row", 0.0, 1.0),
        }
        if self.values:
            what = "entry of the row of a patch, times the number of patches: 1 is an even row"
            patches = float(self.layout.num_patches)
            # A grid of one patch has no other value than 1.
            high = max(patches, 10.0)
            each["value"] = Quantity(layer, "even row", what, FAINTEST, high, log=True)
        if self.coverages:
            each |= {
                "window_area": Quantity(window, "share of the grid", "area of windows", 0.0, 1.0),
                "window_height": Quantity(window, "patches", "height of windows", 0.0, float(rows)),
                "window_width": Quantity(window, "patches", "width of windows", 0.0, float(cols)),
            }
        what = "distance to what a patch attends to, mean over patches"
        found = {"attention_distance": Quantity(("layer", "head"), "patches", what, 0.0, far)}
        for name in self.indicators:
            found |= {f"{name}_{key}": quantity for key, quantity in each.items()}
        return found

    def empty(self) -> dict[str, Statistics]:
        """Statistics of nothing yet, of every quantity."""
        sizes = {
            "layer": self.depth,
            "head": self.heads,
            "coverage": len(self.coverages),
            "row_offset": 2 * self.layout.rows - 1,
            "col_offset": 2 * self.layout.cols - 1,
        }
        return {
            name: Statistics.empty(tuple(sizes[dim] for dim in one.dims), one.edges)
            for name, one in self.quantities().items()
        }


def observe(
    design: Design, model: ViT, params: Mapping[str, Any], images: Images, sharpness: Any = None
) -> dict[str, Float[Array, "..."]]:
    """The quantities of a batch; traceable, and no stack `[L, B, H, N, N]` exists.

    Args:
      design: what to survey.
      model: our `ViT`.
      params: its parameters.
      images: normalised `[B, h, w, 3]`.
      sharpness: of predicted windows; None is that of the model's config.

    Returns:
      Name to entries: the first axis is that of images, or, for what is of each patch, of patches
      of all images. Gradients are of the predicted class.
    """
    names = tuple(design.indicators)
    backward = tuple(name for name in names if needs_backward(name))
    forward = tuple(name for name in names if name not in backward)
    taps = Taps(
        reduce=functools.partial(_reduce, forward, design.layout),
        reduce_grad=Maps(backward) if backward else None,
    )
    tokens = design.layout.num_tokens

    def sinks(attended: Any) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (attended.weights.shape[0], tokens, tokens)
        return dict.fromkeys(backward, jax.ShapeDtypeStruct(shape, attended.weights.dtype))

    score = functools.partial(class_score, classes=None)
    probed = probe(model, params, jnp.asarray(images), taps, sinks, score, sharpness=sharpness)
    found = {"attention_distance": _stack(probed.forward, "distance")}
    for name in names:
        maps = _stack(probed.backward if name in backward else probed.forward, name, axis=0)
        if name == "rollout":
            maps = roll(maps)
        view = patch_view(maps, design.layout)
        found[f"{name}_kernel"] = jnp.moveaxis(kernel(view, design.layout), 0, 1)
        if design.values:
            found[f"{name}_value"] = _values(design, view)
        found |= {f"{name}_{key}": value for key, value in _of_patches(design, view).items()}
    return found


def _reduce(names: tuple[str, ...], layout: TokenLayout, attended: Attended) -> dict[str, Array]:
    rows = attended.weights[..., layout.prefix :, layout.prefix :]
    position = layout.positions()
    far = np.linalg.norm(position[:, None] - position[None], axis=-1).astype(np.float32)
    total = rows.sum(axis=-1)
    distance = (rows * far).sum(axis=-1) / jnp.where(total > 0, total, jnp.nan)
    return {**Maps(names)(attended), "distance": jnp.nanmean(distance, axis=-1)}


def kernel(
    view: Float[Array, "*batch P P"], layout: TokenLayout
) -> Float[Array, "*batch row_offsets col_offsets"]:
    """Mean impact by the offset of the key from the query, over all pairs of patches with it.

    Args:
      view: row-normalised patch-to-patch view.
      layout: the grid of patches.

    Returns:
      `[..., 2 R - 1, 2 C - 1]`, the query itself in the middle; NaN where all rows are zero.
    """
    rows, cols = layout.rows, layout.cols
    grid = view.reshape(*view.shape[:-2], rows, cols, rows, cols)
    total = jnp.einsum("...qckd,cdo->...qko", grid, _offsets(cols), precision="highest")
    total = jnp.einsum("...qko,qkp->...po", total, _offsets(rows), precision="highest")
    pairs = np.einsum("qkp,cdo->po", _offsets(rows), _offsets(cols))
    return jnp.where(view.any(axis=(-2, -1))[..., None, None], total / pairs, jnp.nan)


def _offsets(size: int) -> np.ndarray:
    """1 at (query, key, offset) where the key is at that offset, `[size, size, 2 size - 1]`."""
    place = np.arange(size)
    offset = place[None] - place[:, None] + size - 1
    return np.eye(2 * size - 1, dtype=np.float32)[offset]


@functools.cache
def value_pairs(layout: TokenLayout) -> Int[np.ndarray, " pairs"]:
    """The pairs of patches whose values are counted, as `query * P + key`.

    Of all pairs in the order of their distance every `n`-th, so that each distance, the patch
    itself included, has its share to within one pair, from all over the grid. Always the same for
    a grid; all pairs where there are no more than `MOST_PAIRS`.
    """
    place = layout.positions()
    apart = ((place[:, None] - place[None]) ** 2).sum(axis=-1).ravel()
    # Odd, since an even step would meet the same of four neighbours in every row.
    step = -(-len(apart) // MOST_PAIRS) | 1
    pairs = np.argsort(apart, kind="stable")[step // 2 :: step]
    pairs.setflags(write=False)
    return pairs


def _values(design: Design, view: Float[Array, "L B P P"]) -> Float[Array, "entries L"]:
    """Entries of `value_pairs` as 1 for an even row; NaN for rows of zeros."""
    patches = design.layout.num_patches
    pairs = value_pairs(design.layout)
    entries = view.reshape(*view.shape[:2], -1)[..., pairs] * patches
    defined = view.any(axis=-1)[..., pairs // patches]
    entries = jnp.where(defined, entries, jnp.nan)
    return jnp.moveaxis(entries, 0, -1).reshape(-1, design.depth)


def _of_patches(design: Design, view: Float[Array, "L B P P"]) -> dict[str, Array]:
    """Fields and windows, patches of all images on the first axis."""
    layout = design.layout
    field = responsive_field(view, layout)

    def pooled(values: Array) -> Array:
        return jnp.moveaxis(values, -3, -1).reshape(-1, design.depth)

    found = {
        "tendency_row": pooled(field.tendency[..., 0]),
        "tendency_col": pooled(field.tendency[..., 1]),
        "tendency": pooled(jnp.linalg.norm(field.tendency, axis=-1)),
        "spread": pooled(field.spread),
        "eccentricity": pooled(field.eccentricity),
        "entropy": pooled(field.entropy),
    }
    if design.coverages:
        boxes = smallest_windows(view, layout, design.coverages)
        sides = {
            "area": window_area(boxes, layout),
            "height": (boxes[..., 2] - boxes[..., 0]).astype(jnp.float32),
            "width": (boxes[..., 3] - boxes[..., 1]).astype(jnp.float32),
        }
        for what, values in sides.items():
            # Rows of zeros have a window by definition only.
            values = jnp.where(jnp.isnan(field.spread), jnp.nan, values)
            several = jax.vmap(pooled, out_axes=1)(values)
            found[f"window_{what}"] = several
    return found


def pool(
    statistics: Mapping[str, Statistics],
    found: Mapping[str, Float[Array, "..."]],
    real: Bool[Array, " B"],
    axis_name: str | None = None,
) -> dict[str, Statistics]:
    """Adds a batch.

    Args:
      statistics: from `Design.empty`, or of earlier batches; the same on all devices.
      found: from `observe`.
      real: which images are not padding.
      axis_name: mesh axis that images are split over, inside `shard_map`.
    """
    pooled = {}
    for name, before in statistics.items():
        entries = found[name]
        mask = jnp.repeat(real, entries.shape[0] // real.shape[0])
        batch = Statistics.empty(before.count.shape, before.edges).update(entries, mask)
        if axis_name is not None:
            batch = batch.all_reduce(axis_name)
        pooled[name] = before.merge(batch)
    return pooled


def _stack(layers: list[dict[str, Array]], name: str, axis: int = 1) -> Array:
    return jnp.stack([layer[name] for layer in layers], axis=axis)
