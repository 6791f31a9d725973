"""Drawings of the responsive field: where a patch's impact comes from, how far, how it grows."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.patheffects import Normal, Stroke
from matplotlib.quiver import Quiver

from vit_interact.viz import style
from vit_interact.viz.image_data import ImageData
from vit_interact.viz.scene import Scene, spread_sample
from vit_interact.viz.sheet import (
    COLUMN,
    MARGIN,
    TITLE,
    WIDTH,
    Sheet,
    column_left,
    draw_map,
    draw_picture,
    panel_rows,
)
from vit_interact.viz.wheel import direction_colors, draw_wheel

_MOST_ARROWS = 24  # along one side; larger grids show every second or third
_WHEEL = 116.0  # pixels
_PLOT = 300.0  # height of the plots of growth, in pixels


@style.styled
def draw_field(data: ImageData) -> Figure:
    """The responsive field: arrows of tendency with a colour wheel, spread, and ellipses.

    Args:
      data: the dataset of one image.

    Returns:
      A figure with axes labelled `tendency` (its quiver holds the vectors in patches, `U` columns
      and `V` rows), `wheel`, `spread` and `ellipses` (one standard deviation).
    """
    scene = Scene(data)
    blank = int(scene.blank_queries.sum())
    note = (
        f"Hatched or bare: {blank} of {scene.patches} patches have a row of zeros, so no field."
        if blank
        else ""
    )
    sheet = Sheet(scene, "Responsive field", [panel_rows(scene, _WHEEL + 24.0)], note)
    top = sheet.tops[0]
    axes = sheet.picture_axes(0, top, "Tendency: where the impact comes from", "tendency")
    draw_picture(axes, scene, colored=False, light=0.45)
    vectors = scene.array("combined_tendency")
    full = full_length(vectors)
    stride = -(-max(scene.rows, scene.cols) // _MOST_ARROWS)
    _, shrink = draw_arrows(axes, vectors, scene.rows, scene.cols, full, stride)
    below = top + TITLE + sheet.panel[1] + 12
    draw_wheel(sheet.axes(MARGIN, below, _WHEEL, _WHEEL), full)
    every = f"one arrow for {stride} x {stride} patches" if stride > 1 else "one arrow a patch"
    sheet.text(
        MARGIN + _WHEEL + 18,
        below,
        f"hue: direction\nsaturation: length,\nfull at {full:.2g} patches\n"
        f"{every},\nlengths drawn x {shrink:.2g}",
        color=style.MUTED,
        fontsize=12.5,
        linespacing=1.35,
    )
    axes = sheet.picture_axes(1, top, "Spread: how far it comes from", "spread")
    sheet.bar(
        draw_map(axes, scene, scene.grid("combined_spread"), "spread"),
        1,
        top,
        f"spread in {style.UNITS['spread']}",
    )
    axes = sheet.picture_axes(2, top, "Ellipses of a sample of patches", "ellipses")
    draw_picture(axes, scene, colored=False, light=0.6)
    _draw_ellipses(axes, scene)
    sheet.text(
        column_left(2),
        below,
        "dot: the patch   ellipse: mean and one\nstandard deviation of what reaches it",
        color=style.MUTED,
        fontsize=12.5,
        linespacing=1.35,
    )
    return sheet.figure


def full_length(vectors: np.ndarray) -> float:
    """Length in patches at which colours are saturated: the 95th percentile of all lengths.

    The longest would make one outlier bleach all others. At least 0.1 patches, so that noise
    around zero isn't drawn as a strong field.
    """
    lengths = np.linalg.norm(np.asarray(vectors, np.float64), axis=-1)
    lengths = lengths[np.isfinite(lengths)]
    return max(float(np.quantile(lengths, 0.95)), 0.1) if lengths.size else 1.0


def draw_arrows(
    axes: Axes,
    vectors: np.ndarray,
    rows: int,
    cols: int,
    full: float,
    stride: int = 1,
    corner: tuple[float, float] = (0.0, 0.0),
    unit: tuple[float, float] = (1.0, 1.0),
) -> tuple[Quiver, float]:
    """Arrows of tendency, coloured by the wheel.

    Args:
      axes: axes with y downwards.
      vectors: `[P, 2]`, `(row, col)` in patches; patches with NaN get no arrow.
      rows: rows of the grid.
      cols: columns of the grid.
      full: length of full saturation, in patches.
      stride: draw every `stride`-th patch along both sides.
      corner: upper left corner `(y, x)` of the grid in the units of the axes.
      unit: height and width of one patch in the units of the axes.

    Returns:
      The quiver, `U` and `V` in the units of the axes, and the factor by which its arrows are
      drawn shorter (or longer) than they are, so that they don't cross.
    """
    row, col = np.divmod(np.arange(rows * cols), cols)
    first = stride // 2
    shown = (row % stride == min(first, rows - 1)) & (col % stride == min(first, cols - 1))
    shown &= np.isfinite(vectors).all(axis=-1)
    chosen = np.asarray(vectors, np.float64)[shown]
    shrink = 1.7 * stride / full
    quiver = axes.quiver(
        corner[1] + (col[shown] + 0.5) * unit[1],
        corner[0] + (row[shown] + 0.5) * unit[0],
        chosen[:, 1] * unit[1],
        chosen[:, 0] * unit[0],
        color=direction_colors(chosen, full),
        angles="xy",
        scale_units="xy",
        scale=1 / shrink,
        units="inches",
        width=0.026,
        headwidth=3.6,
        headlength=4.2,
        headaxislength=3.8,
        minlength=0.5,
        pivot="tail",
    )
    quiver.set_label("arrows")
    return quiver, shrink


def _draw_ellipses(axes: Axes, scene: Scene) -> None:
    """Mean and one standard deviation of what reaches each patch of the sample."""
    sample = spread_sample(scene.rows, scene.cols).ravel()
    tendency, half = scene.array("combined_tendency"), scene.array("combined_axes")
    angle = scene.array("combined_angle")
    for k, patch in enumerate(sample):
        if scene.blank_queries[patch]:
            continue
        row, col = divmod(int(patch), scene.cols)
        color = style.SAMPLE_COLORS[k % len(style.SAMPLE_COLORS)]
        middle = (col + 0.5 + float(tendency[patch, 1]), row + 0.5 + float(tendency[patch, 0]))
        halo = [Stroke(linewidth=4.4, foreground="black", alpha=0.6), Normal()]
        # Rows grow downwards here as in the definition of the angle: from +column towards +row.
        axes.add_patch(
            Ellipse(
                middle,
                2 * float(half[patch, 0]),
                2 * float(half[patch, 1]),
                angle=float(np.degrees(angle[patch])),
                fill=False,
                edgecolor=color,
                linewidth=2.4,
                label=f"ellipse {patch}",
                path_effects=halo,
            )
        )
        axes.plot([col + 0.5, middle[0]], [row + 0.5, middle[1]], color=color, linewidth=1.2)
        axes.plot(col + 0.5, row + 0.5, "o", color=color, markeredgecolor="black", markersize=8)


@style.styled
def draw_growth(data: ImageData) -> Figure:
    """Growth with depth: median and quartiles over the patches of spread, area and entropy.

    Args:
      data: the dataset of one image.

    Returns:
      A figure with axes labelled `spread`, `area` and `entropy`: one point a layer; the dashed
      line is the median of the combination of all layers.
    """
    scene = Scene(data)
    quantities = {
        "spread": "Spread of the field",
        "area": "Area of the windows",
        "entropy": "Entropy of the rows",
    }
    layers = scene.layers
    blank = 0
    if layers and "spread" in scene.data:
        blank = int((~np.isfinite(scene.array("spread"))).any(axis=-1).sum())
    note = f"Rows of zeros, in {blank} of {len(layers)} layers, are left out." if blank else ""
    sheet = Sheet(scene, "Growth of the field with depth", [_PLOT + 140.0], note)
    color = style.indicator_style(str(scene.data.attrs.get("indicator", ""))).color
    for column, (name, title) in enumerate(quantities.items()):
        left = column_left(column) + 74
        axes = sheet.axes(left, sheet.tops[0] + TITLE, COLUMN - 74, _PLOT)
        axes.set(label=name, ylabel=style.UNITS[name], xlabel="layer")
        axes.set_title(title)
        axes.grid(axis="y", color=style.FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        _draw_quartiles(axes, scene, name, color)
    handles, labels = sheet.figure.axes[0].get_legend_handles_labels()
    sheet.figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=((column_left(0) + 60) / WIDTH, 4 / sheet.height),
        ncols=3,
    )
    return sheet.figure


def _draw_quartiles(axes: Axes, scene: Scene, name: str, color: str) -> None:
    """Median with the middle half of the patches, against the layer."""
    layers = np.array(scene.layers, float)
    if layers.size and name in scene.data:
        values = scene.array(name).reshape(len(layers), -1).astype(np.float64)
        # The window of a row of zeros is one patch by definition, which says nothing.
        values[~np.isfinite(scene.array("spread").reshape(values.shape))] = np.nan
        defined = np.isfinite(values).any(axis=-1)
        quartiles = np.full((3, len(layers)), np.nan)
        if defined.any():
            quartiles[:, defined] = np.nanquantile(values[defined], (0.25, 0.5, 0.75), axis=-1)
        low, middle, high = quartiles
        if len(layers) > 1:
            axes.fill_between(layers, low, high, color=color, alpha=0.22, linewidth=0,
                              label="middle half of the patches")  # fmt: skip
        else:
            axes.errorbar(layers, middle, [middle - low, high - middle], color=color, capsize=6,
                          linewidth=2, label="middle half of the patches")  # fmt: skip
        axes.plot(layers, middle, "o-", color=color, linewidth=2.4, markersize=6, label="median")
        step = -(-len(layers) // 12)
        axes.set_xticks(layers[::step], [f"{layer:.0f}" for layer in layers[::step]])
        pad = 0.05 * (layers[-1] - layers[0]) or 1.0
        axes.set_xlim(layers[0] - pad, layers[-1] + pad)
    else:
        axes.text(0.5, 0.5, "no single layers kept", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
    combined = scene.array(f"combined_{name}")
    defined = np.isfinite(combined) & ~scene.blank_queries
    if defined.any():
        axes.axhline(
            float(np.median(combined[defined])),
            color=style.MUTED,
            linewidth=1.6,
            linestyle=(0, (5, 3)),
            label="median, all layers combined",
        )
    axes.margins(y=0.15)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=6)
