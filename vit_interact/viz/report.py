"""A plain static page over a folder of analyses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np

from vit_interact.data.naming import slug, visible
from vit_interact.viz import style
from vit_interact.viz.scene import Scene, predictions
from vit_interact.viz.stems import TITLES

if TYPE_CHECKING:
    import xarray as xr


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
