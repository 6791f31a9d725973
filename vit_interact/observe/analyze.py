"""`vi.analyze`: everything about one batch, as a labelled `xarray.Dataset`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.interactions import fields, indicators, removal, views, windows
from vit_interact.interactions.boxes import clipped_boxes
from vit_interact.layout import TokenLayout
from vit_interact.models.vit import Images, ViT
from vit_interact.models.winft import predicted_distances, window_layers
from vit_interact.observe.measure import measure_with_logits
from vit_interact.observe.probe import Score, choose_layers, class_score, make_score

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
    indicator: str = "leave_one_out",
    coverage: float = 0.9,
    layers: Sequence[int] | None = None,
    score: Score = "predicted",
    layout: TokenLayout | None = None,
) -> xr.Dataset:
    """Interactions, adaptive windows, received impact, removal order and responsive fields.

    Everything is computed by one compiled program; one call with the same shapes and options
    compiles once.

    Args:
      model: as for `vi.measure`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`.
      indicator: one of `interactions.INDICATORS`.
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
    import xarray as xr

    if layout is None:
        if not isinstance(model, ViT):
            raise ValueError("a model that is not vit_interact's needs layout=TokenLayout(...)")
        layout = model.config.layout
    indicators.check_name(indicator)
    images = jnp.asarray(images)
    chosen = choose_layers(model, params, images, layers)
    function, classes = make_score(score, images.shape[0])
    found = _analyze(
        model, params, images, classes, indicator, float(coverage), chosen, function, layout
    )
    found = jax.tree.map(np.asarray, found)

    variables: dict[str, Any] = {}
    for name, dims in _DIMS.items():
        units = {"units": _UNITS.get(name, indicators.UNITS[indicator])}
        per_layer = np.moveaxis(found["layers"][name], 0, 1)
        variables[name] = (("image", "layer", *dims), per_layer, units)
        if name in ("interaction", "received_impact"):
            units = {"units": "share of the row" if name == "interaction" else "mean of layers"}
        variables[f"combined_{name}"] = (("image", *dims), found["combined"][name], units)
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
    if "predicted_window" in found:
        coords["window_layer"] = list(window_layers(model))
    return xr.Dataset(
        variables,
        coords=coords,
        attrs={
            "indicator": indicator,
            "indicator_unit": indicators.UNITS[indicator],
            "coverage": float(coverage),
            "score_of": score if isinstance(score, str) else "given",
            "rows": layout.rows,
            "cols": layout.cols,
            "prefix": layout.prefix,
        },
    )


@functools.partial(
    jax.jit, static_argnames=("model", "indicator", "coverage", "layers", "score", "layout")
)
def _analyze(
    model: Any,
    params: Any,
    images: Array,
    classes: Array | None,
    indicator: str,
    coverage: float,
    layers: tuple[int, ...],
    score: Callable[[Array], Array] | None,
    layout: TokenLayout,
) -> dict[str, Any]:
    asked: Score = score or ("predicted" if classes is None else classes)
    logits, maps = measure_with_logits(model, params, images, (indicator,), asked, layers)
    measured = maps[indicator]  # [L, B, N, N]
    rolled = indicator == "rollout"
    combined = measured[-1] if rolled else views.combine_layers(measured, layout)
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    top, prediction = jax.lax.top_k(probability, min(5, logits.shape[-1]))
    whole = _describe(combined, layout, coverage, normalised=True)
    impact = whole["received_impact"]
    predicted = {}
    if isinstance(model, ViT) and window_layers(model):
        _, distances = predicted_distances(model, params, images)
        predicted["predicted_window"] = clipped_boxes(distances, layout)
    return {
        **predicted,
        "layers": _describe(measured, layout, coverage, normalised=False),
        "combined": whole,
        "removal_order": removal.removal_order(impact.reshape(*impact.shape[:-2], -1)),
        "prediction": prediction,
        "probability": top,
        "score": score(logits) if score else class_score(logits, classes),
    }


def _describe(
    indicator: Float[Array, "*batch N N"], layout: TokenLayout, coverage: float, normalised: bool
) -> dict[str, Array]:
    """Every variable of `_DIMS` for indicators with any leading axes."""
    view = views.patch_view(indicator, layout, rows=normalised)
    box = windows.smallest_windows(view, layout, coverage)
    impact = removal.received_impact(indicator, layout)
    return {
        "interaction": view,
        "received_impact": impact.reshape(*impact.shape[:-1], layout.rows, layout.cols),
        "window": box,
        "area": windows.window_area(box, layout),
        **fields.responsive_field(view, layout)._asdict(),
    }
