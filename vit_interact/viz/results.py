"""Tabs of the interactive report beside its images: `verify.json` and a survey, as JSON blocks.

A block is curves with intervals, a table, or a row of maps; `static/results.js` draws them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_interact.data.naming import visible
from vit_interact.viz.style import CONTROL, indicator_style
from vit_interact.viz.verification import CONTROLS, VARIANTS

if TYPE_CHECKING:
    import xarray as xr

Row = dict[str, Any]
Block = dict[str, Any]

_HOW = {"drop": "tokens deleted", "mask": "keys hidden", "zero": "pixels grey"}
_WHEN = {
    "lowest": "measured once",
    "staged": "measured again on what is left",
    "patches": "without prefix rows",
    "highest": "highest first",
}


def verification_tab(report: dict[str, Any]) -> dict[str, Any]:
    """Curves and tables of `verify.json`.

    Args:
      report: its content.

    Raises:
      ValueError: if it is not of `vit-interact verify`.
    """
    try:
        base = report["base"]
        note = (
            f"{visible(str(report['options']['model']))}; top-1 of {base['images']} images, whole "
            f"model {100 * base['top1']:.1f} %; bands are 95 % bootstrap intervals over images"
        )
        blocks = [*_windows(report), *_removal(report), *_faithfulness(report)]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"is no verify.json of vit-interact verify (no {error})") from error
    return {"title": "Verification", "note": note, "blocks": blocks}


def _windows(report: dict[str, Any]) -> list[Block]:
    rows = report["windows"]
    blocks = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        lines = []
        for name, kind in dict.fromkeys((row["indicator"], row["kind"]) for row in own):
            some = [row for row in own if (row["indicator"], row["kind"]) == (name, kind)]
            known = indicator_style(name)
            label = known.label if kind == "indicator" else f"{known.label}: {_control(kind)[0]}"
            dash = None if kind == "indicator" else _control(kind)[2]
            lines.append(_line(some, "area", "top1", label, known.color, dash))
        title = f"Top-1 inside windows: {VARIANTS.get(variant, variant)}"
        blocks.append(
            _curves(title, "mean window area (share of the grid)", "top-1 (share of images)", lines)
        )
    return blocks


def _removal(report: dict[str, Any]) -> list[Block]:
    rows, blocks = report["removal"], []
    for how in dict.fromkeys(row["intervention"] for row in rows):
        lines = []
        for order in dict.fromkeys(row["order"] for row in rows if row["intervention"] == how):
            own = [row for row in rows if (row["order"], row["intervention"]) == (order, how)]
            label, color, dash = _order(order)
            line = _line(own, "removed", "top1", label, color, dash)
            # Beside the same order measured once, which has its colour and dashes.
            staged = order.endswith(("/staged", "_staged"))
            lines.append({**line, "width": 3.5 if staged else 2})
        title = f"Top-1 with patches removed: {_HOW.get(how, how)}"
        blocks.append(_curves(title, "share of patches removed", "top-1 (share of images)", lines))
    if report["removal_auc"]:
        ranked = sorted(report["removal_auc"], key=lambda row: -row["auc"])
        cells = [
            [_order(row["order"])[0], _HOW.get(row["intervention"], row["intervention"]),
             f"{100 * row['auc']:.1f}", _interval(row["auc_95"], 100, 1)]
            for row in ranked
        ]  # fmt: skip
        columns = ["order of removal", "how", "area under the curve, %", "95 % interval"]
        blocks.append(
            {"kind": "table", "title": "Removal, best first", "columns": columns, "rows": cells}
        )
    return blocks


def _faithfulness(report: dict[str, Any]) -> list[Block]:
    rows = report.get("faithfulness") or []
    if not rows:
        return []
    cells = [
        [indicator_style(row["indicator"]).label, f"{row['rho']:.3f}", _interval(row["rho_95"]),
         f"{row['rho_within_layers']:.2f}"]
        for row in sorted(rows, key=lambda row: -row["rho"])
    ]  # fmt: skip
    title = f"Rank agreement with {rows[0]['edges']} edges really cut, {rows[0]['images']} images"
    columns = ["indicator", "Spearman's rho", "95 % interval", "rho within a layer"]
    table = {"kind": "table", "title": title, "columns": columns, "rows": cells}
    lines, groups = [], report.get("groups") or []
    for name, kind in dict.fromkeys((row["indicator"], row["kind"]) for row in groups):
        own = [row for row in groups if (row["indicator"], row["kind"]) == (name, kind)]
        known, dash = indicator_style(name), {"bottom": [5, 3], "random": [1.5, 2.5]}.get(kind)
        label = f"{known.label}, {'strongest' if kind == 'top' else 'weakest'}"
        if kind == "random":
            if name != groups[0]["indicator"]:
                continue  # the same edges for all
            label = "random edges"
        lines.append(_line(own, "share", "change", label, known.color, dash))
    blocks: list[Block] = [table]
    if lines:
        title, across = "Groups of edges masked", "share of patch-to-patch edges, each layer"
        blocks.append(_curves(title, across, "change of the class's logit", lines))
    return blocks


def survey_tab(dataset: xr.Dataset) -> dict[str, Any]:
    """Offset maps and growth with depth of a store of `vit-interact statistics`.

    Args:
      dataset: the store.

    Raises:
      ValueError: if it is no such store.
    """
    try:
        design = json.loads(dataset.attrs["design"])
        depth = range(int(dataset.sizes["layer"]))
        names = design["indicators"]
        count = int(dataset[f"{names[0]}_kernel_count"].values.max())
        blocks = [_kernels(dataset, name) for name in names]
        for what, unit in (("spread", "patches"), ("tendency", "patches"),
                           ("entropy", "share of log P")):  # fmt: skip
            lines = [_band(dataset, f"{name}_{what}", name, depth) for name in names]
            blocks.append(_curves(f"Field by depth: {what}", "layer", f"{what} ({unit})", lines))
        lines = []
        for k, coverage in enumerate(design["coverages"]):
            dash = [None, [5, 3], [1.5, 2.5]][k % 3]
            for name in names:
                band = _band(dataset, f"{name}_window_area", name, depth, coverage=k)
                label = f"{band['label']}, {100 * coverage:.0f} % held"
                lines.append({**band, "label": label, "dash": dash})
        if lines:
            title, down = "Windows by depth", "window area (share of the grid)"
            blocks.append(_curves(title, "layer", down, lines))
        heads = dataset["attention_distance_mean"].values
        lines = [
            _plain(list(depth), heads[:, head], f"head {head}", CONTROL)
            for head in range(heads.shape[1])
        ]
        blocks.append(
            _curves("Attention distance by head", "layer", "mean distance (patches)", lines)
        )
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"is no store of vit-interact statistics (no {error})") from error
    note = f"{count} images; bands are one deviation of patches"
    return {"title": "Statistics", "note": note, "blocks": blocks}


def _kernels(dataset: xr.Dataset, name: str) -> Block:
    """Mean impact by offset from the query, layer by layer."""
    mean = dataset[f"{name}_kernel_mean"].values
    seen = dataset[f"{name}_kernel_count"].values > 0
    values = np.where(seen & (mean > 0), mean, 0.0)
    known = values[values > 0]
    low, high = (np.quantile(known, 0.01), known.max()) if known.size else (0.1, 1.0)
    return {
        "kind": "maps",
        "title": f"Mean interaction by offset from the query: {indicator_style(name).label}",
        "unit": "share of the row",
        "rows": values.shape[1],
        "cols": values.shape[2],
        "low": float(low),
        "high": float(max(high, low * 1.01)),
        "maps": [
            [f"layer {layer}", base64.b64encode(one.astype("<f4").tobytes()).decode()]
            for layer, one in enumerate(values)
        ],
    }


def _band(
    dataset: xr.Dataset, quantity: str, name: str, depth: Sequence[int], coverage: int | None = None
) -> dict[str, Any]:
    mean, variance = (dataset[f"{quantity}_{part}"].values for part in ("mean", "variance"))
    if coverage is not None:
        mean, variance = mean[coverage], variance[coverage]
    known, deviation = indicator_style(name), np.sqrt(variance)
    line = _plain(list(depth), mean, known.label, known.color)
    low, high = _listed(np.maximum(mean - deviation, 0)), _listed(mean + deviation)
    return {**line, "low": low, "high": high}


def _line(
    rows: list[Row], x: str, y: str, label: str, color: str, dash: Any = None
) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: row[x])
    line = _plain([row[x] for row in rows], [row[y] for row in rows], label, color)
    low, high = ([row[f"{y}_95"][end] for row in rows] for end in (0, 1))
    return {**line, "low": low, "high": high, "dash": dash}


def _plain(x: Sequence[float], y: Any, label: str, color: str) -> dict[str, Any]:
    return {"label": visible(label), "color": color, "x": list(x), "y": _listed(y)}


def _curves(title: str, x: str, y: str, lines: list[dict[str, Any]]) -> Block:
    return {"kind": "curves", "title": title, "xlabel": x, "ylabel": y, "lines": lines}


def _listed(values: Any) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, float)]


def _order(order: str) -> tuple[str, str, Any]:
    """Label, colour and dashes of an order of removal."""
    name, _, kind = order.partition("/")
    if kind:
        known = indicator_style(name)
        dash = None if kind in ("lowest", "staged") else [5, 3]
        return f"{known.label}, {_WHEN.get(kind, kind)}", known.color, dash
    label, color, dash = _control(name)
    return label, color, dash


def _control(name: str) -> tuple[str, str, Any]:
    if name.startswith("random") and name[6:].isdecimal():
        return f"random order {int(name[6:]) + 1}", CONTROL, [1.5, 2.5]
    if name not in CONTROLS:
        return name.replace("_", " "), CONTROL, [1.5, 2.5]
    label, color, dashes, _ = CONTROLS[name]
    if name.endswith("_staged"):
        label += f", {_WHEN['staged']}"
    return label, color, [2 * part for part in dashes[1]]


def _interval(bounds: Sequence[float], scale: float = 1, digits: int = 3) -> str:
    return f"{scale * bounds[0]:.{digits}f} to {scale * bounds[1]:.{digits}f}"
