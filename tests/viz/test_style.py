"""The rules of all figures: colours that can be told apart, bars with units, whole pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from made_up import make_dataset
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from vit_interact.interactions.statistics import Statistics
from vit_interact.layout import TokenLayout
from vit_interact.survey.quantities import Design
from vit_interact.survey.store import to_dataset
from vit_interact.viz import contact, figures, png, style, survey, training, verification
from vit_interact.viz.predicted import draw_predicted_windows
from vit_interact.viz.scene import Scene
from vit_interact.viz.sheet import fitted
from vit_interact.viz.wheel import cyclic_lab, oklab_to_srgb

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def surveyed(rows: int = 4, cols: int = 6, depth: int = 3) -> xr.Dataset:
    """A survey of random numbers, one layer of the kernel all zeros."""
    design = Design(TokenLayout(rows, cols, 1), depth, 2, ("attention", "edge"), (0.5, 0.9))
    rng = np.random.default_rng(0)
    found: dict[str, Statistics] = {}
    for name, state in design.empty().items():
        entries = rng.gamma(1.0, 1.0, (50, *state.count.shape)).astype(np.float32)
        if name == "edge_kernel":
            entries[:, -1] = np.nan
        found[name] = state.update(entries)
    about = {"images": 50, "pixels_per_patch": [14]}
    return to_dataset(design, found, about)


def some_windows() -> Figure:
    """Predicted windows of two images with a grid of 4 x 6."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (2, 56, 84, 3), dtype=np.uint8)
    boxes = np.sort(rng.uniform(0, 4, (3, 2, 1, 24, 2, 2)), axis=-2).reshape(3, 2, 1, 24, 4)
    goals = np.round(boxes[:, :, 0]).astype(np.int32)
    layout = TokenLayout(4, 6, 1)
    return draw_predicted_windows(pictures, boxes, goals, (0, 5, 11), layout, "Windows")


def some_confusion(count: int = 7) -> Figure:
    figures = {"confusion": np.eye(count, dtype=int), "accuracy": 1.0, "examples": count}
    return training.draw_confusion(figures, [f"class number {k}" for k in range(count)])


def some_tendency() -> Figure:
    picture = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    arrows = np.random.default_rng(0).normal(size=(4, 24, 2))
    return training.draw_tendency(picture, arrows, TokenLayout(4, 6, 1))


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def arms() -> Figure:
    runs = {
        name: [[tuple(point) for point in one["val_by_epoch"]] for one in arm["runs"].values()]
        for name, arm in result("winft_cifar.json")["arms"].items()
    }
    return training.draw_arms({**runs, "of their own": [[(1, 0.2), (9, 0.4)]] * 2})


def areas() -> dict[str, list[list[tuple[int, float]]]]:
    shares = [0.9, 0.44, 0.5, 0.44, 0.43, 0.44]
    return {
        "winft": [[(k, a - 0.02 * n) for k, a in enumerate(shares)] for n in range(3)],
        "free": [[(k, 0.9 - 0.1 * k) for k in range(6)]],
    }


ONE = make_dataset(6, 9, names=("wide.jpg",), zero_rows=(0, 31))
EVERY: dict[str, Callable[[], Figure]] = {
    **{stem: lambda draw=draw: draw(ONE.isel(image=0)) for stem, draw in figures.FIGURES.items()},
    "window areas": lambda: training.draw_window_areas(areas()),
    "sheet": lambda: contact.draw_contact_sheet(
        [ONE.isel(image=k) for k in range(ONE.sizes["image"])]
    ),
    "kernel": lambda: survey.draw_kernel(surveyed(), "edge"),
    "fields": lambda: survey.draw_fields(surveyed()),
    "distance": lambda: survey.draw_distance(surveyed()),
    "survey windows": lambda: survey.draw_windows(surveyed()),
    "values": lambda: survey.draw_values(surveyed()),
    "verify windows": lambda: verification.draw_windows_curves(result("choosing.json")),
    "controls": lambda: verification.draw_windows_curves(result("windows_leave_one_out.json")),
    "verify removal": lambda: verification.draw_removal_curves(result("removal.json")),
    "faithfulness": lambda: verification.draw_faithfulness(result("faithfulness.json")),
    "curves": lambda: training.draw_curves(result("training_cifar.json")["curve"]),
    "confusion": some_confusion,
    "many classes": lambda: some_confusion(101),
    "tendency": some_tendency,
    "training windows": some_windows,
    "arms": arms,
}


@pytest.fixture(scope="module", params=sorted(EVERY))
def figure(request: pytest.FixtureRequest) -> Figure:
    drawn = EVERY[request.param]()
    FigureCanvasAgg(drawn).draw()
    return drawn


def bars(figure: Figure) -> list[Colorbar]:
    return [axes._colorbar for axes in figure.axes if hasattr(axes, "_colorbar")]


def colored(axes: Axes) -> list:
    """Maps of one value: artists whose colours a bar has to explain."""
    found = [*axes.images, *axes.collections]
    return [one for one in found if np.ndim(one.get_array()) in (1, 2) and np.size(one.get_array())]


def test_every_map_has_a_bar_with_a_label(figure: Figure) -> None:
    known = [(bar.mappable.get_cmap().name, bar.mappable.get_clim()) for bar in bars(figure)]
    for bar in bars(figure):
        axes = bar.ax
        told = axes.get_xlabel() + axes.get_ylabel() + axes.get_title(loc="left") + axes.get_label()
        assert len(told) > 3
    for axes in figure.axes:
        if hasattr(axes, "_colorbar"):
            continue
        for one in colored(axes):
            name = one.get_cmap().name
            if name == "gray":
                continue  # a photograph
            own = axes.get_label() in ("layers", "sheet")  # each on its own scale, and it says so
            matching = [limits for cmap, limits in known if cmap == name]
            assert matching if own else one.get_clim() in matching, axes.get_label()


def test_axes_with_numbers_say_their_unit(figure: Figure) -> None:
    for axes in figure.axes:
        if not axes.get_visible() or not axes.axison or hasattr(axes, "_colorbar"):
            continue
        if axes.xaxis.get_tick_params().get("labelbottom", True) and axes.get_xticklabels():
            shown = [text for text in axes.get_xticklabels() if text.get_text()]
            assert not shown or axes.get_xlabel(), axes.get_title(loc="left")


def test_text_is_large_enough_and_inside(figure: Figure) -> None:
    """At half size 11 points are 7 to 8 pixels; nothing is cut off at the border."""
    width, height = figure.canvas.get_width_height()
    beyond = set()  # labels of ticks outside the limits are made, but not drawn
    for axis in figure.findobj(mpl.axis.Axis):
        low, high = sorted(axis.get_view_interval())
        room = 1e-6 * (high - low)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low - room <= tick.get_loc() <= high + room:
                beyond |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text().strip()]
    for text in texts:
        if text in beyond:
            continue
        if not text.get_visible() or (text.axes is not None and not text.axes.axison):
            continue
        assert text.get_fontsize() >= 10.5, text.get_text()
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1, text.get_text()
        assert box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()


def test_titles_of_neighbours_do_not_overlap(figure: Figure) -> None:
    boxes = [
        (axes._left_title.get_text(), axes._left_title.get_window_extent())
        for axes in figure.axes
        if axes.get_visible() and axes._left_title.get_text()
    ]
    for k, (words, box) in enumerate(boxes):
        for other, there in boxes[k + 1 :]:
            assert not box.overlaps(there), (words, other)


def test_whole_patches_are_whole_pixels(figure: Figure) -> None:
    """Maps and pictures of panels begin at a pixel, and so does each patch."""
    height = figure.canvas.get_width_height()[1]
    for axes in figure.axes:
        for image in axes.images:
            if image.get_label() in ("picture",) or axes.get_label() in (
                "sheet",
                "layers",
                "wheel",
            ):
                continue
            array = image.get_array()
            if array.ndim == 3 and array.shape[0] > 40:
                continue  # a photograph
            left, right, bottom, top = image.get_extent()
            (x0, y0), (x1, y1) = axes.transData.transform([(left, bottom), (right, top)])
            for edge in (x0, x1, height - y0, height - y1):
                assert edge == pytest.approx(round(edge), abs=1e-6)
            cells = abs(x1 - x0) / array.shape[1], abs(y1 - y0) / array.shape[0]
            for cell in cells:
                assert cell == pytest.approx(round(cell), abs=1e-6)


def test_pixels_of_a_map_are_squares_of_one_colour() -> None:
    """In the drawn picture itself: within each patch all pixels are alike."""
    data = make_dataset(7, 9, (0,), names=("odd.jpg",)).isel(image=0)
    drawn = figures.draw_received_impact(data)
    pixels = png.pixels(drawn, style.DPI)
    (axes,) = [axes for axes in drawn.axes if axes.get_label() == "impact"]
    box = axes.get_window_extent()
    top, left = round(len(pixels) - box.y1), round(box.x0)
    cell = round(box.width / 9)
    assert round(box.height / 7) == cell
    inside = pixels[top : top + 7 * cell, left : left + 9 * cell]
    patches = inside.reshape(7, cell, 9, cell, 3).swapaxes(1, 2)
    assert (patches == patches[:, :, :1, :1]).all()


@pytest.mark.parametrize(
    ("rows", "cols", "expected"),
    [(16, 16, (448, 448)), (37, 37, (444, 444)), (14, 14, (448, 448)), (6, 9, (441, 294))],
)
def test_panels_fit_whole_patches(rows: int, cols: int, expected: tuple[int, int]) -> None:
    scene = Scene(make_dataset(rows, cols, (), names=("a",), picture=False).isel(image=0))
    assert fitted(scene, 448, 560) == expected
    # Too many patches for whole pixels: the shape is kept instead.
    assert fitted(scene, 1.5 * cols, 560) == pytest.approx((1.5 * cols, 1.5 * rows))


def lightness(colors: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB colours, to the power that makes steps look even."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ [0.2126, 0.7152, 0.0722])


def seen_without_red(colors: np.ndarray) -> np.ndarray:
    """sRGB as seen by a deuteranope (Viénot, Brettel & Mollon 1999)."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    kept = linear @ np.array([[0.29275, 0.29275, -0.02234], [0.70725, 0.70725, 0.02234], [0, 0, 1]])
    return np.cbrt(np.clip(kept, 0, 1))


@pytest.mark.parametrize("quantity", sorted(style.COLORMAPS))
def test_lightness_tells_the_value(quantity: str) -> None:
    colors = mpl.colormaps[style.COLORMAPS[quantity]](np.linspace(0, 1, 64))[:, :3]
    steps = np.diff(lightness(colors))
    if quantity == "signed":
        assert (steps[:28] > 0).all() and (steps[-28:] < 0).all()
        ends = np.abs(seen_without_red(colors[0]) - seen_without_red(colors[-1]))
        assert ends.max() > 0.2
    else:
        assert (steps > 0).all() or (steps < 0).all()


def test_the_cyclic_map_closes() -> None:
    rim = oklab_to_srgb(cyclic_lab())
    steps = np.abs(np.diff(rim, axis=0, append=rim[:1])).max(axis=1)
    assert steps[-1] <= steps.max() < 0.02


def test_indicators_and_controls_stay_apart_for_everyone() -> None:
    colors = [look.color for look in style.INDICATORS.values()] + [style.CONTROL]
    seen = seen_without_red(np.array([to_rgb(color) for color in colors]))
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert apart[np.triu_indices(len(colors), 1)].min() > 0.1
    controls = [color for _, color, _, _ in verification.CONTROLS.values()]
    assert not set(controls) & {look.color for look in style.INDICATORS.values()}


def test_arms_have_the_same_look_whatever_else_is_drawn() -> None:
    run = [[(1.0, 0.2), (2.0, 0.3)]]
    for others in ((), ("vit", "local")):
        drawn = training.draw_arms({name: run for name in (*others, "winft")})
        line = drawn.axes[0].lines[-1]
        assert line.get_color() == training.ARMS["winft"].color
        assert "WinfT: 30.0 % (1 run)" in line.get_label()
    looks = {(arm.color, str(arm.dashes)) for arm in training.ARMS.values()}
    assert len(looks) == len(training.ARMS)


def test_values_are_shares_of_the_entries() -> None:
    data = surveyed()
    drawn = survey.draw_values(data)
    mesh = drawn.axes[0].collections[0]
    counts = data["attention_value_histogram"].values
    np.testing.assert_allclose(mesh.get_array(), counts / counts.sum(1, keepdims=True))
    dots = next(line for line in drawn.axes[0].lines if line.get_label() == "median")
    median = np.median(np.random.default_rng(0).gamma(1.0, 1.0, 100_000))
    np.testing.assert_allclose(dots.get_xdata(), median, rtol=0.5)
    old = data.drop_vars([name for name in data if "_value_" in str(name)])
    assert "attention_value_histogram" not in old


def test_surveys_are_drawn_with_and_without_values(tmp_path) -> None:
    data = surveyed()
    names = {path.name for path in survey.draw_survey(data, tmp_path / "new")}
    assert "values.png" in names and "kernel_edge.png" in names
    old = data.drop_vars([name for name in data if "_value_" in str(name)])
    assert names - {path.name for path in survey.draw_survey(old, tmp_path / "old")} == {
        "values.png"
    }


def test_jpegs_and_palettes_are_small(tmp_path) -> None:
    drawn = training.draw_curves(result("training_cifar.json")["curve"])
    whole = png.save(drawn, tmp_path / "whole.png")
    flat = png.save(drawn, tmp_path / "flat.png", png.FLAT[1:])
    assert flat.stat().st_size < 0.6 * whole.stat().st_size
    with Image.open(whole) as one, Image.open(flat) as other:
        apart = np.asarray(one).astype(int) - np.asarray(other.convert("RGB"))
    assert np.quantile(np.abs(apart), 0.999) <= 8
    photograph = figures.draw_removal(ONE.isel(image=0))
    free = png.save(photograph, tmp_path / "free.jpg").stat().st_size
    bound = png.save(photograph, tmp_path / "bound.jpg", most=free // 2)
    assert bound.stat().st_size < 0.8 * free
    with Image.open(bound) as one:
        assert one.format == "JPEG"
