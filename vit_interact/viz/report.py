"""What a folder of analyses looks like as a whole: contact sheets and a plain static page."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from vit_interact.data.naming import slug, visible
from vit_interact.viz import style
from vit_interact.viz.fields import draw_arrows, full_length
from vit_interact.viz.png import LEVELS, save
from vit_interact.viz.scene import Scene, predictions
from vit_interact.viz.sheet import UPPER, Pixels, color_limits, fitted
from vit_interact.viz.stems import TITLES
from vit_interact.viz.wheel import draw_wheel

#: Images on one contact sheet; more go on further sheets.
IMAGES_A_SHEET = 48

_ACROSS = 3
_THUMB = 148.0
_CELL = 3 * _THUMB + 2 * 6
_GAP = 28
_MARGIN = 28.0
_TOP = 132.0
_WORDS = 66  # height of the two lines below each image
_WIDTH = 2 * _MARGIN + _ACROSS * _CELL + (_ACROSS - 1) * _GAP


def contact_sheet(ds: xr.Dataset, path: str | os.PathLike[str]) -> list[Path]:
    """Draws all images at a glance: picture, received impact over it, arrows of tendency.

    Args:
      ds: the dataset of `vit_interact.analyze`.
      path: the first sheet, such as `OUT/contact_sheet.png`; with more than `IMAGES_A_SHEET`
        images `contact_sheet_2.png` and so on follow.

    Returns:
      The paths written.

    Raises:
      ValueError: if the dataset holds no images.
    """
    first = Path(path)
    count = int(ds.sizes["image"])
    if count == 0:
        raise ValueError("the dataset holds no images, so there is nothing for a contact sheet")
    first.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, count, IMAGES_A_SHEET), start=1):
        target = first if number == 1 else first.with_stem(f"{first.stem}_{number}")
        part = ds.isel(image=slice(start, start + IMAGES_A_SHEET))
        paths.append(save(draw_contact_sheet(part, start, count), target, LEVELS[:2]))
    return paths


@style.styled
def draw_contact_sheet(ds: xr.Dataset, start: int = 0, count: int | None = None) -> Figure:
    """One contact sheet of all images of `ds`.

    Args:
      ds: the images of this sheet.
      start: how many images came on sheets before.
      count: images on all sheets; those of `ds` if None.

    Returns:
      A figure whose axes `sheet` holds for each image its picture, its impact and its arrows.
    """
    scenes = [Scene(ds.isel(image=k)) for k in range(ds.sizes["image"])]
    # One shape for all: a dataset has one size of pictures.
    thumb = fitted(scenes[0], _THUMB, 1.6 * _THUMB)
    cell = math.ceil(thumb[1]) + _WORDS
    height = math.ceil(_TOP + -(-len(scenes) // _ACROSS) * cell + _MARGIN / 2)
    figure = Figure(figsize=(_WIDTH / style.DPI, height / style.DPI), dpi=style.DPI)
    # One axes in pixels for everything: a hundred of them would take seconds.
    axes = figure.add_axes((0, 0, 1, 1), label="sheet")
    axes.set_axis_off()
    for k, scene in enumerate(scenes):
        down, across = divmod(k, _ACROSS)
        _draw_cell(axes, scene, _MARGIN + across * (_CELL + _GAP), _TOP + down * cell, thumb)
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    total = len(scenes) if count is None else count
    shown = f"{total} images"
    if len(scenes) < total:
        shown = f"images {start + 1} to {start + len(scenes)} of {total}"
    model = style.shorten(str(ds.attrs.get("model", "")), 40)
    indicator = style.indicator_style(str(ds.attrs.get("indicator", "unknown"))).label
    axes.text(_MARGIN, 24, f"{shown}  ·  {model}", fontsize=17, fontweight="bold", va="top",
              parse_math=False)  # fmt: skip
    axes.text(
        _MARGIN,
        60,
        f"indicator: {indicator}\npicture  |  received impact over it  |  tendency of each patch",
        color=style.MUTED,
        va="top",
        linespacing=1.4,
        parse_math=False,
    )
    _draw_legends(figure, height)
    return figure


def _draw_cell(
    axes: Axes, scene: Scene, left: float, top: float, thumb: tuple[Pixels, Pixels]
) -> None:
    """Picture, impact, arrows and two lines of words of one image."""
    width, height = thumb
    high, wide = scene.extent
    unit = (height / high, width / wide)
    impact = scene.grid("combined_received_impact")
    low, most = color_limits(impact, UPPER["impact"])
    grey = scene.grey if scene.grey is not None else np.full((1, 1, 3), 225, np.uint8)
    color = scene.picture if scene.picture is not None else grey
    for column, ground in enumerate((color, grey * np.float32(0.8), grey * np.float32(0.4))):
        x = left + column * (width + 6)
        # Plain thinning to about the thumbnail's size; Matplotlib smooths the rest.
        step = max(1, round(min(ground.shape[:2]) / (2 * _THUMB)))
        axes.imshow(
            ground[::step, ::step].astype(np.uint8),
            extent=(x, x + width, top + height, top),
            aspect="auto",
        )
    x = left + width + 6
    finite = np.isfinite(impact)
    strength = np.clip((np.where(finite, impact, low) - low) / (most - low), 0, 1)
    axes.imshow(
        np.ma.masked_invalid(impact),
        cmap=style.COLORMAPS["impact"],
        vmin=low,
        vmax=most,
        alpha=np.where(finite, 0.3 + 0.5 * strength, 0.0),
        extent=(x, x + scene.cols * unit[1], top + scene.rows * unit[0], top),
        interpolation="nearest",
        aspect="auto",
        label="impact",
    )
    vectors = scene.array("combined_tendency")
    stride = -(-max(scene.rows, scene.cols) // 10)
    corner = (top, left + 2 * (width + 6))
    full = full_length(vectors)
    quiver, _ = draw_arrows(axes, vectors, scene.rows, scene.cols, full, stride, corner, unit)
    quiver.width = 0.016
    name = style.shorten(scene.name, 46)
    lines = ((name, style.INK, 6), (scene.prediction(36), style.MUTED, 27))
    for words, ink, below in lines:
        axes.text(left, top + height + below, words, color=ink, fontsize=12.5, va="top",
                  parse_math=False)  # fmt: skip


def _draw_legends(figure: Figure, height: int) -> None:
    """Colour bar and wheel in the upper right corner."""
    place = ((_WIDTH - 580) / _WIDTH, 1 - 66 / height, 250 / _WIDTH, 14 / height)
    bar = figure.colorbar(
        ScalarMappable(cmap=style.COLORMAPS["impact"]),
        cax=figure.add_axes(place),
        orientation="horizontal",
        ticks=[0, 1],
    )
    bar.ax.set_xticklabels(["lowest", f"top {style.percent(1 - UPPER['impact'])}"])
    bar.ax.set_title("received impact, image by image", color=style.MUTED, fontsize=12.5)
    bar.outline.set_visible(False)
    wheel = figure.add_axes(((_WIDTH - 252) / _WIDTH, 1 - 112 / height, 88 / _WIDTH, 88 / height))
    draw_wheel(wheel, 1.0, 90)
    figure.text((_WIDTH - 152) / _WIDTH, 1 - 34 / height, "hue: direction\nsaturation:\nlength",
                va="top", color=style.MUTED, fontsize=12.5)  # fmt: skip


class Guess(NamedTuple):
    """A predicted class and its probability, as text."""

    name: str
    probability: str


class Link(NamedTuple):
    """What a link leads to, and its address, coded for `href`."""

    title: str
    href: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of the page, everything as text.

    Attributes:
      name: file name.
      anchor: its slug.
      guesses: predictions, best first.
      area: mean window area.
      spread: mean spread.
      links: the figures that are there.
    """

    name: str
    anchor: str
    guesses: list[Guess]
    area: str
    spread: str
    links: list[Link]


def index_page(
    ds: xr.Dataset,
    folder: str | os.PathLike[str],
    failures: Sequence[tuple[str, str]],
    path: str | os.PathLike[str],
) -> Path:
    """Writes a static page over a folder of analyses: no scripts, nothing from elsewhere.

    Args:
      ds: the dataset of `vit_interact.analyze`, possibly without images.
      folder: output folder; figures are linked where `images/SLUG/NAME.png` is there, sheets where
        `contact_sheet*.png` is.
      failures: `(name, reason)` of files that could not be analysed.
      path: the page to write, usually `OUT/index.html`.

    Returns:
      The path written. All names are escaped; they stay text.
    """
    target = Path(path)
    interactive = Path(folder) / "report.html"
    page = _template().render(
        rows=list(_rows(ds, Path(folder), target.parent)),
        failures=[(visible(name), visible(reason)) for name, reason in failures],
        report=_href(interactive, target.parent) if interactive.is_file() else "",
        sheets=[_href(sheet, target.parent) for sheet in _sheets(Path(folder))],
        model=visible(str(ds.attrs.get("model", "unknown model"))),
        facts=_facts(ds),
        options=[(name.replace("_", " "), _told(value)) for name, value in ds.attrs.items()],
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, target)
    return target


@functools.cache
def _template() -> jinja2.Template:
    """The page's template; autoescape for every value, undefined names are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vit_interact.viz"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html.j2")


def _rows(ds: xr.Dataset, folder: Path, base: Path) -> Iterator[Row]:
    """The table, image by image."""
    for k in range(ds.sizes["image"]):
        one = ds.isel(image=k)
        scene = Scene(one)
        name = scene.name
        # The window of a row of zeros is one patch by definition, which says nothing.
        area = np.where(scene.blank_queries, np.nan, scene.array("combined_area"))
        files = folder / "images" / slug(name)
        yield Row(
            name=visible(name),
            anchor=slug(name),
            guesses=[
                Guess(visible(name), f"{100 * share:.1f} %") for name, share in predictions(one)
            ],
            area=_mean(area * 100, "{:.1f} %"),
            spread=_mean(scene.array("combined_spread"), "{:.2f} patches"),
            links=[
                Link(title, _href(files / f"{stem}.png", base))
                for stem, title in TITLES.items()
                if (files / f"{stem}.png").is_file()
            ],
        )


def _sheets(folder: Path) -> list[Path]:
    """Contact sheets in their order: 2 before 10."""
    found = folder.glob("contact_sheet*.png")
    return sorted(found, key=lambda sheet: (len(sheet.name), sheet.name))


def _href(file: Path, base: Path) -> str:
    """A relative address of a file; spaces, quotes, `?` and `#` in folders are coded."""
    return quote(Path(os.path.relpath(file, base)).as_posix())


def _mean(values: np.ndarray, form: str) -> str:
    """Mean over the patches that have a number."""
    finite = values[np.isfinite(values)]
    return form.format(float(finite.mean())) if finite.size else "not defined"


def _facts(ds: xr.Dataset) -> list[tuple[str, str]]:
    """The few options that a reader wants first."""
    coverage = f"{float(ds.attrs.get('coverage', np.nan)):.0%}".replace("%", " %")
    indicator = style.indicator_style(str(ds.attrs.get("indicator", "unknown"))).label
    return [
        ("indicator", indicator),
        ("window coverage", coverage),
        ("patch grid", f"{ds.sizes.get('row', 0)} x {ds.sizes.get('col', 0)}"),
        ("layers", str(ds.sizes.get("layer", 0))),
    ]


def _told(value: Any) -> str:
    """An attribute as text; JSON is laid out."""
    if isinstance(value, str) and value[:1] in "{[":
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return visible(value)
    if isinstance(value, dict | list):
        return json.dumps(value, indent=1, ensure_ascii=False)
    return visible(str(value))
