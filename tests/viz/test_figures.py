"""What is drawn is what the dataset holds, for every shape of grid and every gap in it."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from made_up import make_dataset
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vit_interact.viz import figures, png, stems, style
from vit_interact.viz.fields import full_length
from vit_interact.viz.scene import Scene, coverage_map, spaced_strongest, spread_sample
from vit_interact.viz.sheet import color_limits
from vit_interact.viz.wheel import cyclic_lab, direction_colors

EVERY = sorted(figures.FIGURES)


def axes_of(figure: Figure, label: str) -> Axes:
    """The one axes with this label."""
    (found,) = [axes for axes in figure.axes if axes.get_label() == label]
    return found


def map_of(axes: Axes, label: str) -> np.ndarray:
    """The values of the one image with this label; masked values as NaN."""
    (found,) = [image for image in axes.images if image.get_label() == label]
    return np.ma.filled(found.get_array().astype(np.float64), np.nan)


def words(figure: Figure) -> str:
    """All text of a figure."""
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
    return "\n".join(text.get_text() for text in texts)


@pytest.mark.parametrize("name", ["square", "oblong"])
def test_impact_is_the_datasets(name: str, request: pytest.FixtureRequest) -> None:
    one = request.getfixturevalue(name).isel(image=0)
    figure = figures.draw_received_impact(one)
    expected = one["combined_received_impact"].values
    for label in ("overlay", "impact"):
        np.testing.assert_array_equal(map_of(axes_of(figure, label), "impact"), expected)
    strip = axes_of(figure, "layers")
    for k, layer in enumerate((0, 5, 11)):
        drawn = map_of(strip, f"layer {layer}")
        np.testing.assert_array_equal(drawn, one["received_impact"].values[k])
    told = words(figure)
    assert one["image"].item() in told
    assert "dalmatian (91.0 %)" in told
    assert "leave one out" in told
    assert "coverage 90 %" in told
    assert "change of the update" in told
    assert "received impact (layers over their means)" in told


def test_interaction_shows_the_rows_of_the_strongest(oblong: xr.Dataset) -> None:
    one = oblong.isel(image=0)
    figure = figures.draw_interaction(one)
    chosen = spaced_strongest(one["combined_received_impact"].values, 6)
    assert chosen[0] == one["combined_received_impact"].values.argmax()
    for patch in chosen:
        axes = axes_of(figure, f"patch {patch}")
        row = one["combined_interaction"].values[patch].copy()
        if not row.any():
            continue
        row[patch] = np.nan
        np.testing.assert_array_equal(map_of(axes, "interaction").ravel(), row)
        box = {shape.get_label(): shape for shape in axes.patches}
        top, left, bottom, right = one["combined_window"].values[patch]
        assert box["window"].get_bbox().bounds == (left, top, right - left, bottom - top)
        assert box["query"].get_xy() == (patch % 9, patch // 9)
    assert "share of the row" in words(figure)


def test_a_strong_patch_with_a_row_of_zeros_is_said_so() -> None:
    ds = make_dataset(5, 5, zero_rows=tuple(range(25)), names=("blank.png",))
    figure = figures.draw_interaction(ds.isel(image=0))
    assert words(figure).count("a row of zeros: nothing to show") == 6


def test_windows_areas_and_coverage(oblong: xr.Dataset) -> None:
    one = oblong.isel(image=0)
    windows = one["combined_window"].values
    figure = figures.draw_windows(one)
    sample = spread_sample(6, 9).ravel()
    assert len(sample) == 9
    for patch in sample:
        axes = axes_of(figure, f"window {patch}")
        boxes = [shape for shape in axes.patches if shape.get_label() == "window"]
        if patch in (0, 31):
            assert not boxes
            continue
        top, left, bottom, right = windows[patch]
        assert boxes[0].get_bbox().bounds == (left, top, right - left, bottom - top)
    area = map_of(axes_of(figure, "area"), "area")
    expected = one["combined_area"].values.reshape(6, 9).astype(np.float64)
    assert np.isnan(area.ravel()[[0, 31]]).all()
    assert np.isnan(area).sum() == 2
    np.testing.assert_allclose(area[~np.isnan(area)], expected[~np.isnan(area)], rtol=1e-6)
    labels = [c.get_label() for c in axes_of(figure, "area").collections]
    assert "missing" in labels
    assert "2 of 54 patches have a row of zeros" in words(figure)
    drawn = map_of(axes_of(figure, "coverage"), "coverage")
    for patch in range(54):
        row, col = divmod(patch, 9)
        inside = [t <= row < b and left <= col < r for t, left, b, r in windows]
        assert drawn[row, col] == pytest.approx(np.mean(inside))


def test_arrows_are_the_tendency(oblong: xr.Dataset) -> None:
    one = oblong.isel(image=0)
    figure = figures.draw_field(one)
    (arrows,) = [c for c in axes_of(figure, "tendency").collections if c.get_label() == "arrows"]
    vectors = one["combined_tendency"].values
    good = np.isfinite(vectors).all(-1)
    assert good.sum() == 52
    np.testing.assert_allclose(arrows.U, vectors[good, 1], rtol=1e-6)
    np.testing.assert_allclose(arrows.V, vectors[good, 0], rtol=1e-6)
    row, col = np.divmod(np.flatnonzero(good), 9)
    np.testing.assert_allclose(arrows.XY, np.stack([col + 0.5, row + 0.5], -1))
    colors = direction_colors(vectors[good].astype(np.float64), full_length(vectors))
    np.testing.assert_allclose(arrows.get_facecolor()[:, :3], colors)
    spread = map_of(axes_of(figure, "spread"), "spread")
    np.testing.assert_array_equal(spread.ravel(), one["combined_spread"].values)
    axes_of(figure, "wheel")
    assert "patches" in words(figure)


def test_ellipses_are_the_axes_and_angles(square: xr.Dataset) -> None:
    one = square.isel(image=1)
    axes = axes_of(figures.draw_field(one), "ellipses")
    ellipses = {shape.get_label(): shape for shape in axes.patches}
    for patch in spread_sample(8, 8).ravel():
        shape = ellipses[f"ellipse {patch}"]
        major, minor = one["combined_axes"].values[patch]
        assert (shape.width, shape.height) == pytest.approx((2 * major, 2 * minor))
        assert np.radians(shape.angle) == pytest.approx(one["combined_angle"].values[patch])
        down, right = one["combined_tendency"].values[patch]
        assert shape.center == pytest.approx((patch % 8 + 0.5 + right, patch // 8 + 0.5 + down))


def test_large_grids_thin_their_arrows() -> None:
    ds = make_dataset(50, 2, (0,), names=("tall.png",))
    figure = figures.draw_field(ds.isel(image=0))
    (arrows,) = [c for c in axes_of(figure, "tendency").collections if c.get_label() == "arrows"]
    assert len(arrows.U) == 17
    assert "one arrow for 3 x 3 patches" in words(figure)


def test_growth_is_median_and_quartiles(square: xr.Dataset) -> None:
    one = square.isel(image=0)
    figure = figures.draw_growth(one)
    for name, unit in (("spread", "patches"), ("area", "share of the grid"), ("entropy", "log P")):
        axes = axes_of(figure, name)
        lines = {line.get_label(): line for line in axes.lines}
        np.testing.assert_array_equal(lines["median"].get_xdata(), [0, 5, 11])
        expected = np.median(one[name].values, axis=-1)
        np.testing.assert_allclose(lines["median"].get_ydata(), expected, rtol=1e-6)
        assert unit in axes.get_ylabel()
        assert axes.get_xlabel() == "layer"
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(np.quantile(one[name].values, 0.25, axis=-1).min())


def test_growth_leaves_out_patches_and_layers_without_a_number(oblong: xr.Dataset) -> None:
    one = oblong.isel(image=0).copy(deep=True)
    for name in ("spread", "entropy"):
        one[name][2] = np.nan
    figure = figures.draw_growth(one)
    good = np.isfinite(one["spread"].values[:2])
    assert good.sum() == 2 * 52
    # The 1x1 windows of rows of zeros count as little as their spread.
    for name in ("spread", "area", "entropy"):
        axes = axes_of(figure, name)
        drawn = next(line for line in axes.lines if line.get_label() == "median").get_ydata()
        expected = np.nanmedian(np.where(good, one[name].values[:2], np.nan), axis=-1)
        np.testing.assert_allclose(drawn[:2], expected, rtol=1e-6)
        assert np.isnan(drawn[2])
    assert "Rows of zeros, in 3 of 3 layers, are left out." in words(figure)


def test_removal_greys_the_first_of_the_order(oblong: xr.Dataset) -> None:
    one = oblong.isel(image=0)
    order = one["removal_order"].values
    figure = figures.draw_removal(one)
    for share, gone in ((0, 0), (0.25, 13), (0.5, 27), (0.75, 40), (0.9, 48)):
        axes = axes_of(figure, f"removed {share:g}")
        (cover,) = [image for image in axes.images if image.get_label() == "removed"]
        hidden = np.flatnonzero(np.asarray(cover.get_array())[..., 3].ravel())
        assert set(hidden) == set(order[:gone])
        assert f"{54 - gone} of 54 patches stay" in axes._left_title.get_text()
    place = map_of(axes_of(figure, "order"), "order").ravel()
    np.testing.assert_array_equal(place[order], np.arange(1, 55))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {"layers": (3,)},
        {"layers": ()},
        {"rows": 1, "cols": 7, "layers": tuple(range(14))},
        {"rows": 9, "cols": 2, "picture": False, "class_names": None},
        {"rows": 4, "cols": 4, "zero_rows": tuple(range(16))},
        {"rows": 1, "cols": 1, "layers": (0,)},
    ],
    ids=["one layer", "no layers", "one row", "no picture", "all zeros", "one patch"],
)
@pytest.mark.filterwarnings("error")
def test_every_figure_is_drawn_for_every_shape(name: str, options: dict) -> None:
    ds = make_dataset(**{"rows": 5, "cols": 6, "names": ("one.png",), **options})
    figure = figures.FIGURES[name](ds.isel(image=0))
    FigureCanvasAgg(figure).draw()
    shape = ds.sizes["row"], ds.sizes["col"]
    for axes in figure.axes:
        if axes.images and axes.get_label() in ("overlay", "impact", "area", "order", "spread"):
            assert axes.get_xlim() == (0, shape[1])
            assert axes.get_ylim() == (shape[0], 0)
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(shape[1] / shape[0], rel=1e-3)


def test_a_rest_that_fills_no_patch_stays_bare() -> None:
    ds = make_dataset(3, 4, names=("rest.png",))
    wide = np.pad(ds["picture"].values, ((0, 0), (0, 5), (0, 9), (0, 0)))
    ds = ds.drop_vars("picture").assign(picture=(("image", "y", "x", "channel"), wide))
    scene = Scene(ds.isel(image=0))
    assert scene.patch_pixels == (14, 14)
    assert scene.extent == pytest.approx((47 / 14, 65 / 14))
    axes = axes_of(figures.draw_received_impact(scene.data), "overlay")
    (heat,) = [image for image in axes.images if image.get_label() == "impact"]
    assert tuple(heat.get_extent()) == (0, 4, 3, 0)


def test_patches_need_not_be_square() -> None:
    ds = make_dataset(4, 4, names=("thin.png",))
    ds.attrs["patch_size"] = [14, 7]
    ds = ds.isel(x=slice(0, 28))
    scene = Scene(ds.isel(image=0))
    assert scene.patch_pixels == (14, 7)
    assert scene.aspect == 0.5


def test_names_are_shortened_and_never_formulas() -> None:
    name = "$x_1$ " + "very " * 30 + "long\n\N{SNOWMAN}\N{CJK UNIFIED IDEOGRAPH-732B}.jpg"
    ds = make_dataset(4, 4, names=(name,), class_names=("a", "b" * 80, "c", "d", "e"))
    figure = figures.draw_received_impact(ds.isel(image=0))
    FigureCanvasAgg(figure).draw()
    title, subtitle = figure.texts[0], figure.texts[1]
    assert len(title.get_text()) < 90
    assert not title.get_parse_math()
    assert title.get_text().endswith("\N{WHITE SQUARE}.jpg")
    assert "…" in subtitle.get_text()


def test_png_files_are_whole_small_and_wide(square: xr.Dataset, tmp_path) -> None:
    paths = figures.render_image(square.isel(image=0), tmp_path / "new" / "folder")
    assert [path.stem for path in paths] == list(figures.FIGURES)
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    for path in paths:
        assert path.stat().st_size < 500_000
        with Image.open(path) as picture:
            assert 1200 <= picture.size[0] <= 1600
            assert np.ptp(np.asarray(picture.convert("L"))) > 100


def test_files_above_the_limit_lose_depth_not_size(tmp_path, monkeypatch) -> None:
    ds = make_dataset(16, 16, (0,), names=("noise.png",))
    noise = np.random.default_rng(0).integers(0, 256, ds["picture"].shape, dtype=np.uint8)
    ds["picture"] = (ds["picture"].dims, noise)
    figure = figures.draw_received_impact(ds.isel(image=0))
    whole = png.save(figure, tmp_path / "whole.png")
    monkeypatch.setattr(png, "MOST_BYTES", whole.stat().st_size - 1)
    coarse = png.save(figure, tmp_path / "coarse.png")
    assert coarse.stat().st_size < 0.8 * whole.stat().st_size
    with Image.open(whole) as one, Image.open(coarse) as other:
        apart = np.asarray(one).astype(int) - np.asarray(other)
    assert 0 < np.abs(apart).max() <= 8


def test_drawing_changes_no_setting_and_needs_no_pyplot(square: xr.Dataset) -> None:
    before = dict(mpl.rcParams)
    for draw in figures.FIGURES.values():
        draw(square.isel(image=0))
    assert dict(mpl.rcParams) == before


def test_what_cannot_be_drawn_is_said(square: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="several images: choose one"):
        figures.draw_windows(square)
    one = square.isel(image=0)
    with pytest.raises(ValueError, match="no variable combined_received_impact"):
        figures.draw_windows(one.drop_vars("combined_received_impact"))
    with pytest.raises(KeyError, match="combined_window"):
        figures.draw_windows(one.drop_vars("combined_window"))


def test_strongest_keep_their_distance_while_there_is_room() -> None:
    impact = np.zeros((8, 8))
    impact[2, 2], impact[2, 3], impact[6, 6], impact[0, 7] = 9, 8, 7, np.nan
    assert list(spaced_strongest(impact, 2)) == [18, 54]
    assert list(spaced_strongest(np.arange(4.0).reshape(2, 2), 6)) == [3, 2, 1, 0]


def test_coverage_map_of_one_whole_window() -> None:
    windows = np.array([[0, 0, 2, 3]] * 3 + [[1, 2, 2, 3]] * 3, np.int32)
    expected = [[0.5, 0.5, 0.5], [0.5, 0.5, 1.0]]
    np.testing.assert_array_equal(coverage_map(windows, 2, 3), expected)


def test_color_limits_hold_for_constant_empty_and_extreme_maps() -> None:
    # The area of windows that all are the whole grid is 1, and no share is more.
    assert color_limits(np.full((2, 2), 1.0)) == (0.0, 1.0)
    assert color_limits(np.full((2, 2), -3.0)) == (-3.0, 0.0)
    assert color_limits(np.zeros((2, 2))) == (0.0, 1.0)
    assert color_limits(np.full((2, 2), np.nan)) == (0.0, 1.0)
    low, high = color_limits(np.append(np.linspace(0, 1, 99), 1000.0), 0.98)
    assert (low, high) == pytest.approx((0.0, 0.99), abs=0.01)


def test_the_wheel_turns_evenly_and_stays_apart_without_red_and_green() -> None:
    lab = cyclic_lab()
    steps = np.linalg.norm(np.diff(lab, axis=0, append=lab[:1]), axis=-1)
    assert steps.max() / steps.min() < 1.02
    # Without the red-green axis opposite directions differ still, in lightness or in blue-yellow.
    seen = lab[:, [0, 2]]
    assert np.linalg.norm(seen - np.roll(seen, len(seen) // 2, axis=0), axis=-1).min() > 0.15


def test_directions_have_their_hue_and_length_its_saturation() -> None:
    colors = direction_colors(np.array([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]), 1.0)
    right, left, down, up = colors
    assert right[0] > right[1]
    assert left[1] > left[0]
    assert down[0] > down[2]
    assert up[2] > up[0]
    np.testing.assert_allclose(direction_colors(np.zeros((1, 2)), 1.0), 1.0, atol=1e-3)
    with pytest.raises(ValueError, match="positive"):
        direction_colors(np.zeros((1, 2)), 0.0)


def test_every_indicator_has_its_own_colour_and_unit() -> None:
    assert len(style.INDICATORS) == 7
    assert len({look.color for look in style.INDICATORS.values()}) == 7
    assert all(look.label and look.unit for look in style.INDICATORS.values())
    assert style.indicator_style("my_own").label == "my own"
    for name in style.COLORMAPS.values():
        assert name in mpl.colormaps


def test_predicted_windows_are_the_datasets(square: xr.Dataset) -> None:
    one = square.isel(image=0).assign_coords(window_layer=[0, 3])
    figure = figures.draw_predicted(one)
    for place, layer in enumerate((0, 3)):
        axes = axes_of(figure, f"predicted {layer}")
        drawn = [patch for patch in axes.patches if patch.get_label() == "predicted"]
        assert len(drawn) == 3
        boxes = one["predicted_window"].values[place, 0]
        for box in drawn:
            (left, top), (width, height) = box.get_xy(), (box.get_width(), box.get_height())
            assert [top, left, top + height, left + width] in boxes.tolist()
        # Layer 3 was not measured.
        goals = [patch for patch in axes.patches if patch.get_label() == "goal"]
        assert len(goals) == (3 if layer == 0 else 0)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1).mean() / len(boxes)
    assert f"layer 3: mean area {area:.0%}".replace("%", " %") in words(figure)
    plain = one.drop_vars("predicted_window")
    assert list(figures.FIGURES) == list(stems.TITLES)
    assert "predicted" not in [stem for stem in stems.TITLES if stems.applies(stem, plain)]
