"""Curves of a verification: accuracy inside windows, and without removed patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vit_interact.viz.png import FLAT, save
from vit_interact.viz.style import CONTROL, MUTED, indicator_style, percent, styled

Row = dict[str, Any]

_DASH_DOT = (0, (5, 1.5, 1, 1.5))
# Label, colour, dashes, and the orders of removal that it is the control of. All are grey, which no
# indicator is; dashes and markers tell them apart.
CONTROLS: dict[str, tuple[str, str, Any, tuple[str, ...]]] = {
    "centred": ("centred box", CONTROL, (0, (4, 2)), ()),
    "random": ("random place", CONTROL, (0, (1, 1.5)), ()),
    "lowest": ("least impact", CONTROL, (0, (8, 2)), ()),
    "grid": ("fixed grid", CONTROL, _DASH_DOT, ()),
    "class_attention": ("class token, all layers", CONTROL, (0, (4, 2)), ("lowest",)),
    "class_attention_last": ("class token, last layer", CONTROL, _DASH_DOT, ("lowest",)),
    "class_attention_staged": ("class token, all layers", CONTROL, (0, (4, 2)), ("staged",)),
    "random0": ("random order, 1 of 3", CONTROL, (0, (1, 1.5)), ("lowest", "staged")),
}
# Variants of windows, in the order of panels.
VARIANTS = {
    "layers": "windows of each layer",
    "staged": "windows measured again in windows",
    "shared": "one window for all layers",
    "data": "one mask for all images",
}
_MARKERS = {
    "centred": "s", "random": "^", "lowest": "v", "grid": "D",
    "class_attention": "s", "class_attention_last": "D", "class_attention_staged": "s",
    "random0": "^",
}  # fmt: skip


def draw_verification(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the curves of `verify.json`.

    Args:
      report: the content of `verify.json`.
      folder: where `windows.png`, `removal.png` and `faithfulness.png` go.

    Returns:
      The files written.
    """
    written = []
    for name, rows, draw in (
        ("windows.png", report["windows"], draw_windows_curves),
        ("removal.png", report["removal"], draw_removal_curves),
        ("faithfulness.png", report["faithfulness"], draw_faithfulness),
    ):
        if rows:
            path = folder / name
            written.append(save(draw(report), path, FLAT))
    return written


@styled
def draw_windows_curves(report: dict[str, Any]) -> Figure:
    """Top-1 against mean window area, for indicators and for one indicator's controls.

    Args:
      report: the content of `verify.json`.
    """
    rows = report["windows"]
    names = list(dict.fromkeys(row["indicator"] for row in rows))
    shown = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    controlled = {row["variant"] for row in rows if row["kind"] in CONTROLS}
    compared = [name for name in shown if name in controlled]
    panels = len(shown) + len(compared)
    figure = Figure(figsize=(0.5 + 4 * max(2, panels), 4.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, variant in zip(axes, shown, strict=False):
        for name in names:
            style = indicator_style(name)
            _curve(axis, _pick(rows, name, variant, "indicator"), "area", style.label, style.color)
        axis.set_title(VARIANTS[variant])
    for axis, variant in zip(axes[len(shown) :], compared, strict=True):
        _compare(axis, [row for row in rows if row["variant"] == variant], names, variant)
    right = 1.06 * max(row["area"] for row in rows)
    for axis in axes:
        _finish(axis, report, "mean area (share of the grid)")
        axis.set_xlim(0, right)
        axis.legend(loc="lower right")
    _explain(figure, report)
    axes[0].set_ylabel("top-1 (share of images)")
    return figure


def _compare(axis: Axes, rows: list[Row], names: list[str], variant: str) -> None:
    """The windows that lead most, on average, against controls of the same area."""
    kinds = [kind for kind in CONTROLS if any(row["kind"] == kind for row in rows)]

    def lead(name: str) -> float:
        controls = max(_mean(_pick(rows, name, variant, kind)) for kind in kinds)
        return _mean(_pick(rows, name, variant, "indicator")) - controls

    best = max(names, key=lead)
    style = indicator_style(best)
    _curve(axis, _pick(rows, best, variant, "indicator"), "area", style.label, style.color)
    for kind in kinds:
        label, color, dashes, _ = CONTROLS[kind]
        own = _pick(rows, best, variant, kind)
        _curve(axis, own, "area", label, color, dashes, marker=_MARKERS[kind])
    axis.set_title(f"{VARIANTS[variant]}\nagainst boxes of the same area")


@styled
def draw_removal_curves(report: dict[str, Any]) -> Figure:
    """Top-1 against the share of patches removed, least discriminative first.

    Args:
      report: the content of `verify.json`.
    """
    rows = report["removal"]
    titles = {"drop": "tokens deleted", "mask": "keys hidden", "zero": "pixels grey"}
    staged = any(row["order"].endswith("staged") for row in rows)
    once = any(row["order"].endswith("/lowest") for row in rows)
    panels = [
        (how, kind)
        for how in dict.fromkeys(row["intervention"] for row in rows)
        for kind, there in (("lowest", once or not staged), ("staged", staged))
        if there
    ]
    figure = Figure(figsize=(1.2 + 3.8 * max(2, len(panels)), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (how, kind) in zip(axes, panels, strict=True):
        own = [row for row in rows if row["intervention"] == how]
        for order in dict.fromkeys(row["order"] for row in own):
            curve = [row for row in own if row["order"] == order]
            name, _, of = order.partition("/")
            if of == kind:
                style = indicator_style(name)
                _curve(axis, curve, "removed", style.label, style.color)
            elif not of and name in CONTROLS and kind in CONTROLS[name][3]:
                label, color, dashes, _ = CONTROLS[name]
                marker = _MARKERS[name]
                _curve(axis, curve, "removed", label, color, dashes, marker=marker)
        when = "measured again on what is left" if kind == "staged" else "measured once"
        axis.set_title(f"{titles[how]}\n{when}")
        _finish(axis, report, "share of patches removed")
        axis.legend(loc="lower left")
    _explain(figure, report)
    axes[0].set_ylabel("top-1 (share of images)")
    return figure


@styled
def draw_faithfulness(report: dict[str, Any]) -> Figure:
    """Rank agreement with cut edges, effect of masked groups, and of redrawn weights.

    Args:
      report: the content of `verify.json`.
    """
    rows = sorted(report["faithfulness"], key=lambda row: row["rho"])
    names = [row["indicator"] for row in report["faithfulness"]]
    figure = Figure(figsize=(16.5, 5.2), layout=ConstrainedLayoutEngine(wspace=0.04))
    bars, masked, redrawn = figure.subplots(1, 3)
    for place, row in enumerate(rows):
        style, (low, high) = indicator_style(row["indicator"]), row["rho_95"]
        bars.plot([low, high], [place, place], color=style.color, linewidth=2)
        bars.plot(row["rho"], place, "o", color=style.color)
        bars.annotate(
            f"{row['rho']:.2f}", (row["rho"], place), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize="small",
        )  # fmt: skip
    bars.set_yticks(range(len(rows)), [indicator_style(row["indicator"]).label for row in rows])
    bars.set_xlim(min(0.0, *(row["rho_95"][0] for row in rows)), 1.05)
    bars.set_ylim(-0.5, len(rows) - 0.3)
    bars.set_title("edges really cut\n1: ranked as by the logit's change")
    bars.set_xlabel("rank correlation (Spearman's rho)")
    for name in names:
        style = indicator_style(name)
        for kind, dashes in (("top", "-"), ("bottom", (0, (4, 2)))):
            own = [r for r in report["groups"] if (r["indicator"], r["kind"]) == (name, kind)]
            label = style.label if kind == "top" else None
            _curve(masked, own, "share", label, style.color, dashes, y="change")
        curve = [row for row in report["sanity"] if row["indicator"] == name]
        x, y = [row["redrawn"] for row in curve], [row["rho_original"] for row in curve]
        redrawn.plot(x, y, color=style.color, marker="o", markersize=3, label=style.label)
    control = [r for r in report["groups"] if (r["indicator"], r["kind"]) == (names[0], "random")]
    how: Any = {"y": "change", "marker": "^"}
    _curve(masked, control, "share", "random edges", CONTROL, (0, (1, 1.5)), **how)
    masked.set_title("groups masked\nsolid: strongest, dashed: weakest")
    masked.set_xlabel("share of patch-to-patch edges, each layer")
    masked.locator_params(axis="x", nbins=5)  # with three decimals, more touch each other
    masked.set_ylabel("change of the class's logit")
    redrawn.set_title("weights redrawn from the top\nwhat follows the truth changes")
    redrawn.set_xlabel("blocks redrawn")
    redrawn.set_ylabel("rho with the indicator before")
    redrawn.set_ylim(top=1.05)
    for axis in (bars, masked, redrawn):
        axis.grid(visible=True, alpha=0.3)
    figure.legend(*masked.get_legend_handles_labels(), loc="outside right center")
    first = report["faithfulness"][0]
    figure.suptitle(
        f"{first['images']} images, {first['edges']} edges; lines and bands: 95 % bootstrap "
        "intervals over images",
        fontsize="medium", ha="left", x=0.01,
    )  # fmt: skip
    return figure


def _pick(rows: list[Row], indicator: str, variant: str, kind: str) -> list[Row]:
    wanted = (indicator, variant, kind)
    return [row for row in rows if (row["indicator"], row["variant"], row["kind"]) == wanted]


def _mean(rows: list[Row]) -> float:
    return sum(row["top1"] for row in rows) / len(rows)


def _curve(
    axis: Axes, rows: list[Row], x: str, label: str | None, color: str, dashes: Any = "-",
    y: str = "top1", marker: str = "o",
) -> None:  # fmt: skip
    rows = sorted(rows, key=lambda row: row[x])
    xs, ys = [row[x] for row in rows], [row[y] for row in rows]
    size = 4 if marker == "o" else 6
    axis.plot(xs, ys, color=color, linestyle=dashes, marker=marker, markersize=size, label=label)
    low, high = zip(*(row[f"{y}_95"] for row in rows), strict=True)
    axis.fill_between(xs, low, high, color=color, alpha=0.07, linewidth=0)
    if len(xs) == 1:  # a band of no width cannot be seen
        axis.vlines(xs, low, high, color=color, alpha=0.5, linewidth=1.5)


def _finish(axis: Axes, report: dict[str, Any], xlabel: str) -> None:
    axis.axhline(report["base"]["top1"], color=MUTED, linewidth=1.2, zorder=1)
    axis.set_xlabel(xlabel)
    axis.set_ylim(0, 1.02)
    axis.grid(visible=True, alpha=0.3)


def _explain(figure: Figure, report: dict[str, Any]) -> None:
    """What the line at the top and the bands are, once for all panels."""
    base = report["base"]
    figure.suptitle(
        f"top-1 of {base['images']} images; line across: whole model, {percent(base['top1'], 1)}; "
        "bands: 95 % bootstrap intervals",
        fontsize="medium", ha="left", x=0.01,
    )  # fmt: skip
