"""Contact sheets and the page: nothing escapes, nothing is lost, every link leads somewhere."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import xarray as xr
from made_up import make_dataset
from PIL import Image

from vit_interact.data.naming import slug
from vit_interact.drawing import renderer
from vit_interact.viz import contact, report
from vit_interact.viz.stems import IMAGES_A_SHEET, TITLES

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Addresses, texts and alternative texts of a page; raises where tags don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        known = dict(attrs)
        if "href" in known:
            self.links.append(str(known["href"]))
        if "id" in known:
            self.ids.append(str(known["id"]))
        if tag == "img":
            self.images.append(known)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_slugs_are_safe_unique_and_the_same_each_time() -> None:
    names = [
        "cat.jpg", "CAT.jpg", "cat jpg", "cat/jpg", "../cat.jpg", "cat?.jpg", "", "...", "con",
        "ä.png", "ö.png", "\N{CJK UNIFIED IDEOGRAPH-732B}.png", "x" * 300, "x" * 301,
        "<script>.png", "\udcff.png", "nul\0.png", "-rf", "a\nb",
    ]  # fmt: skip
    slugs = [slug(name) for name in names]
    assert len({name.lower() for name in slugs}) == len(names)
    assert slugs == [slug(name) for name in names]
    for name in slugs:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9_-]{0,56}", name)
    assert slug("dogs/Rex 1.jpg").startswith("dogs-rex-1-jpg-")


def test_names_and_reasons_stay_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&amp;.jpg'
    ds = make_dataset(
        3, 3, names=(evil,), class_names=("x", "<img src=q onerror=alert(1)>", "c", "d", "e")
    )
    ds.attrs["weights"] = "</dd><script>alert(2)</script>"
    failures = [("<b>bold</b>.png", 'no "picture" <i>at all</i>'), ("\udcff.png", "bad name")]
    path = report.index_page(ds, tmp_path, failures, tmp_path / "index.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "b", "i"}
    assert "<img src=q" not in text
    for told in (evil, "<b>bold</b>.png", "<img src=q onerror=alert(1)>", "\\udcff.png"):
        assert told in html.unescape(text)


def test_the_table_holds_the_numbers(oblong: xr.Dataset, tmp_path: Path) -> None:
    text = report.index_page(oblong, tmp_path, [], tmp_path / "index.html").read_text()
    good = np.isfinite(oblong["combined_spread"].values)
    area = 100 * float(oblong["combined_area"].values[good].mean())
    spread = float(np.nanmean(oblong["combined_spread"].values))
    for told in ("wide.jpg", "dalmatian", "91.0 %", f"{area:.1f} %", f"{spread:.2f} patches"):
        assert told in text
    for told in ("leave one out", "90 %", "6 x 9", "0.10.2", "ab" * 32, "weights sha256"):
        assert told in text
    assert "Not analysed" not in text
    assert "No figures were drawn." in text


def test_every_link_leads_to_a_file_or_a_place(square: xr.Dataset, tmp_path: Path) -> None:
    out = tmp_path / "an out #1"
    for name in square["image"].values:
        folder = out / "images" / slug(str(name))
        folder.mkdir(parents=True)
        for stem in TITLES:
            (folder / f"{stem}.png").touch()
    for sheet in ("contact_sheet.png", "contact_sheet_2.png", "contact_sheet_10.png"):
        (out / sheet).touch()
    # The page may lie outside of the folder, so that addresses need coding.
    path = report.index_page(square, out, [("a.txt", "no picture")], tmp_path / "page.html")
    page = Page(path.read_text())
    assert len(page.links) > 2 * 6 + 3
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (tmp_path / unquote(link)).is_file(), link
    for image in page.images:
        assert image["alt"]
        assert (tmp_path / unquote(str(image["src"]))).is_file()
    sheets = [unquote(link) for link in page.links if "contact_sheet" in link]
    assert sheets[-1].endswith("contact_sheet_10.png")
    assert len(set(page.ids)) == len(page.ids)


def test_a_page_of_failures_alone(tmp_path: Path) -> None:
    ds = make_dataset(3, 3).isel(image=slice(0, 0))
    text = report.index_page(ds, tmp_path, [("a", "b")], tmp_path / "i.html").read_text()
    assert "0 images analysed" in text
    assert "1 could not be read" in text
    Page(text)


def test_contact_sheet_shows_every_image(square: xr.Dataset, tmp_path: Path) -> None:
    images = [square.isel(image=k) for k in range(2)]
    figure = contact.draw_contact_sheet(images)
    (axes,) = [axes for axes in figure.axes if axes.get_label() == "sheet"]
    heat = [image for image in axes.images if image.get_label() == "impact"]
    assert len(heat) == 2
    assert len(axes.images) == 2 * 4
    for k, image in enumerate(heat):
        expected = square["combined_received_impact"].values[k]
        np.testing.assert_array_equal(np.asarray(image.get_array()), expected)
    arrows = [c for c in axes.collections if c.get_label() == "arrows"]
    assert [len(quiver.U) for quiver in arrows] == [64, 64]
    # Arrows are in pixels of the sheet here: as many as a patch has, times the tendency.
    patch = (heat[0].get_extent()[1] - heat[0].get_extent()[0]) / 8
    expected = square["combined_tendency"].values[0, :, 1] * patch
    np.testing.assert_allclose(arrows[0].U, expected, rtol=1e-5, atol=1e-5)
    told = [text.get_text() for text in axes.texts]
    assert "cat.jpg" in told
    assert told.count("dalmatian (91.0 %)") == 2
    path = contact.contact_sheet(images, tmp_path / "sheets" / "contact_sheet.png")
    with Image.open(path) as picture:
        assert picture.size[0] < 1600


def test_many_images_go_on_further_sheets(tmp_path: Path) -> None:
    names = tuple(f"{k}.png" for k in range(IMAGES_A_SHEET + 1))
    ds = make_dataset(2, 3, (0,), names=names)
    with renderer(1, ()) as draw:
        drawn = draw.sheets(ds, tmp_path / "contact_sheet.png")
        assert [sheet.result() for sheet in drawn] == [None, None]
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["contact_sheet.png", "contact_sheet_2.png"]
    figure = contact.draw_contact_sheet([ds.isel(image=48)], 48, 49)
    assert "images 49 to 49 of 49" in figure.axes[0].texts[-2].get_text()


def test_sheets_stand_gaps(tmp_path: Path) -> None:
    ds = make_dataset(2, 5, (), names=("a",), zero_rows=tuple(range(10)), picture=False)
    contact.contact_sheet([ds.isel(image=0)], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="holds no images"):
        contact.contact_sheet([], tmp_path / "sheet.png")
