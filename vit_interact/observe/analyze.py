"""`vi.analyze`: everything about one batch, as a labelled `xarray.Dataset`."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from vit_interact.interactions import fields, indicators, removal, views, window_masks, windows
from vit_interact.interactions.boxes import clipped_boxes
from vit_interact.layout import TokenLayout
from vit_interact.models.cpu import jit
from vit_interact.models.vit import Images, ViT
from vit_interact.models.winft import predicted_distances, window_layers
from vit_interact.observe.measure import measure_with_logits
from vit_interact.observe.probe import Score, choose_layers, class_score, make_score
from vit_interact.programs import Program

if TYPE_CHECKING:
    import xarray as xr

# Trailing dimensions of what is found for each image, or each image and layer.
_DIMS: dict[str, tuple[str, ...]] = {
    "interaction": ("query", "key"),
    "received_impact": ("row", "col"),
    "window": ("query", "box"),
    "area": ("query",),
    "tendency": ("query", "axis"),
    "spread": ("query",),
    "axes": ("query", "ellipse"),
    "angle": ("query",),
    "eccentricity": ("query",),
    "entropy": ("query",),
}
# What is kept of further indicators: the rest follows from it.
_KEPT = ("interaction", "received_impact")
_UNITS = {
    "window": "patches",
    "area": "share of all patches",
    "tendency": "patches",
    "spread": "patches",
    "axes": "patches",
    "angle": "radians from +column towards +row",
    "eccentricity": "1",
    "entropy": "share of log P",
}
_COORDS = {
    "box": ["top", "left", "bottom", "right"],
    "axis": ["row", "col"],
    "ellipse": ["major", "minor"],
}


def analyze(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicator: str | Sequence[str] = "leave_one_out",
    coverage: float = 0.9,
    layers: Sequence[int] | None = None,
    score: Score = "predicted",
    layout: TokenLayout | None = None,
) -> xr.Dataset:
    """Interactions, adaptive windows, received impact, removal order and responsive fields.

    Windows are searched for by a compiled program of their own, which the report uses again, and
    everything else is another one; calls with the same shapes and options compile once.

    Args:
      model: as for `vi.measure`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`.
      indicator: one of `interactions.INDICATORS`, or several: windows and fields are of the first,
        interactions and received impact of the others are kept as `other_...` variables.
      coverage: share of a row's impact that a window must hold, in (0, 1].
      layers: layers to measure; None is all.
      score: as for `vi.measure`.
      layout: which token is which patch; our `ViT` knows its own.

    Returns:
      A dataset with dimensions image, layer, query, key, row, col and more (docs/method.md lists
      the variables); a model without classes has no `prediction`, and only a window-free
      transformer has `predicted_window`. Across layers, variables start with `combined_`: each
      layer divided by its own mean, then averaged; for `rollout` the rollout through the last
      measured layer.

    Raises:
      ValueError: for unknown options, or when a model that is not ours comes without `layout`.
    """
    if layout is None:
        if not isinstance(model, ViT):
            raise ValueError("a model that is not vit_interact's needs layout=TokenLayout(...)")
        layout = model.config.layout
    names = (indicator,) if isinstance(indicator, str) else tuple(dict.fromkeys(indicator))
    if not names:
        raise ValueError("indicator is empty: expected one or more of interactions.INDICATORS")
    for name in names:
        indicators.check_name(name)
    chosen = choose_layers(model, params, images, layers)
    function, classes = make_score(score, images.shape[0])
    rows = ((len(chosen) + 1) * len(images), layout.num_patches, layout.num_patches)
    with concurrent.futures.ThreadPoolExecutor(1) as meanwhile:
        # XLA leaves the interpreter to others while it reads, compiles and runs a program.
        ready = meanwhile.submit(_prepare, rows, layout, float(coverage))
        program = _analyze.lower(model, params, images, classes, names, chosen, function, layout)
        found = program.compile()(params, images, classes)
        ready.result()
    boxes, area = windows_of(found["rows"], layout, float(coverage))
    import xarray as xr

    found, boxes, area = jax.tree.map(np.asarray, (found, boxes, area))
    for name, flat in {"interaction": found["rows"], "window": boxes, "area": area}.items():
        whole = flat.reshape(len(chosen) + 1, len(images), *flat.shape[1:])
        found["layers"][name], found["combined"][name] = whole[:-1], whole[-1]

    variables: dict[str, Any] = {}
    for name, dims in _DIMS.items():
        units = {"units": _UNITS.get(name, indicators.UNITS[names[0]])}
        per_layer = np.moveaxis(found["layers"][name], 0, 1)
        variables[name] = (("image", "layer", *dims), per_layer, units)
        if name in _KEPT:
            units = {"units": _combined_unit(name)}
        variables[f"combined_{name}"] = (("image", *dims), found["combined"][name], units)
    for name in _KEPT if len(names) > 1 else ():
        # [others, layers, images, ...] -> [images, others, layers, ...]
        per_layer = np.moveaxis(found["others"][name], 2, 0)
        combined = np.moveaxis(found["others_combined"][name], 1, 0)
        variables[f"other_{name}"] = (("image", "other", "layer", *_DIMS[name]), per_layer)
        dims = ("image", "other", *_DIMS[name])
        variables[f"other_combined_{name}"] = (dims, combined, {"units": _combined_unit(name)})
    variables["removal_order"] = (("image", "query"), found["removal_order"])
    if not isinstance(model, ViT) or model.config.has_classes:
        variables["prediction"] = (("image", "top"), found["prediction"])
        variables["probability"] = (("image", "top"), found["probability"], {"units": "1"})
    if "predicted_window" in found:
        dims = ("image", "window_layer", "group", "query", "box")
        boxes = np.moveaxis(found["predicted_window"], 0, 1)
        variables["predicted_window"] = (dims, boxes, {"units": "patches"})
    variables["score"] = (("image",), found["score"], {"units": "logit"})
    coords: dict[str, Any] = {"layer": list(chosen), **_COORDS}
    if len(names) > 1:
        coords["other"] = np.array(names[1:], dtype=object)
    if "predicted_window" in found:
        coords["window_layer"] = list(window_layers(model))
    return xr.Dataset(
        variables,
        coords=coords,
        attrs={
            "indicator": names[0],
            "indicator_unit": indicators.UNITS[names[0]],
            "coverage": float(coverage),
            "score_of": score if isinstance(score, str) else "given",
            "rows": layout.rows,
            "cols": layout.cols,
            "prefix": layout.prefix,
        },
    )


def _prepare(rows: tuple[int, int, int], layout: TokenLayout, coverage: float) -> None:
    """What comes behind the large program."""
    import xarray  # noqa: F401

    windows_of.lower(jax.ShapeDtypeStruct(rows, jnp.float32), layout, coverage).compile()


def _combined_unit(name: str) -> str:
    return "share of the row" if name == "interaction" else "mean of layers"


def _windows_of(
    rows: Float[Array, "*batch P P"], layout: TokenLayout, coverage: float
) -> tuple[Int32[Array, "*batch P 4"], Float[Array, "*batch P"]]:
    boxes = windows.smallest_windows(rows, layout, coverage)
    return boxes, window_masks.window_area(boxes, layout)


windows_of = Program(_windows_of, static_argnames=("layout", "coverage"))
"""`smallest_windows` and their areas, as a program that commands keep."""


@jit(
    batch=lambda model, params, images, *_: (model, images.shape[0]),
    seldom=True,
    static_argnames=("model", "names", "layers", "score", "layout"),
)
def _analyze(
    model: Any,
    params: Any,
    images: Array,
    classes: Array | None,
    names: tuple[str, ...],
    layers: tuple[int, ...],
    score: Callable[[Array], Array] | None,
    layout: TokenLayout,
) -> dict[str, Any]:
    asked: Score = score or ("predicted" if classes is None else classes)
    logits, maps = measure_with_logits(model, params, images, names, asked, layers)
    # No file knows bfloat16.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    combined = _across_layers(maps, names[0], layout)
    probability = jax.nn.softmax(logits, axis=-1)
    top, prediction = jax.lax.top_k(probability, min(5, logits.shape[-1]))
    rows, each_layer, whole = _describe(maps[names[0]], combined, layout)
    impact = whole["received_impact"]
    predicted = {}
    if isinstance(model, ViT) and window_layers(model):
        _, distances = predicted_distances(model, params, images)
        predicted["predicted_window"] = clipped_boxes(distances, layout)
    others: dict[str, Any] = {}
    if len(names) > 1:
        each = jnp.stack([maps[name] for name in names[1:]])  # [others, L, B, N, N]
        whole_each = jnp.stack([_across_layers(maps, name, layout) for name in names[1:]])
        others["others"] = _interactions(each, layout, normalised=False)
        others["others_combined"] = _interactions(whole_each, layout, normalised=True)
    return {
        **predicted,
        **others,
        "rows": rows.reshape(-1, *rows.shape[-2:]),  # of all layers and images, then combined
        "layers": each_layer,
        "combined": whole,
        "removal_order": removal.removal_order(impact.reshape(*impact.shape[:-2], -1)),
        "prediction": prediction,
        "probability": top,
        "score": score(logits) if score else class_score(logits, classes),
    }


def _across_layers(
    maps: Mapping[str, Array], name: str, layout: TokenLayout
) -> Float[Array, "B N N"]:
    """One map for all layers; a rollout has been through them."""
    return maps[name][-1] if name == "rollout" else views.combine_layers(maps[name], layout)


def _interactions(
    indicator: Float[Array, "*batch N N"], layout: TokenLayout, normalised: bool
) -> dict[str, Array]:
    """The variables of `_KEPT` for indicators with any leading axes."""
    impact = removal.received_impact(indicator, layout)
    return {
        "interaction": views.patch_view(indicator, layout, rows=normalised),
        "received_impact": impact.reshape(*impact.shape[:-1], layout.rows, layout.cols),
    }


def _describe(
    layers: Float[Array, "L B N N"],
    combined: Float[Array, "B N N"],
    layout: TokenLayout,
) -> tuple[Float[Array, "M B P P"], dict[str, Array], dict[str, Array]]:
    """Rows of the layers and of what combines them, then what `_DIMS` has beside and of windows."""
    each = _interactions(layers, layout, normalised=False)
    whole = _interactions(combined, layout, normalised=True)
    # As one array: fields and windows are traced and compiled once.
    rows = jnp.concatenate([each.pop("interaction"), whole.pop("interaction")[None]])
    found = fields.responsive_field(rows, layout)._asdict()
    return (
        rows,
        {**each, **{name: value[:-1] for name, value in found.items()}},
        {**whole, **{name: value[-1] for name, value in found.items()}},
    )
