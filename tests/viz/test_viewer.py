"""The interactive report in a real browser."""

import http.server
import re
import threading
import time

import numpy as np
import pytest
import xarray as xr
from browser import opened, settle
from made_up import make_dataset
from PIL import Image
from test_pack import unpacked, with_others

from vit_interact.interactions import responsive_field, smallest_windows
from vit_interact.layout import TokenLayout
from vit_interact.viz.pack import Pack
from vit_interact.viz.page import report_page

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data() -> xr.Dataset:
    names = ("cat/1.jpg", "dalmatian/2.jpg", "<img src=x onerror=alert(1)>.jpg")
    made = make_dataset(7, 9, names=names, zero_rows=(0, 31))
    return with_others(made, "edge")


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):
    lines = [{"label": "<script>alert(2)</script>", "color": "#0072B2", "x": [0, 1], "y": [0.2, 1],
              "low": [0.1, 0.9], "high": [0.3, 1]}]  # fmt: skip
    blocks = [
        {"kind": "curves", "title": "a", "xlabel": "x", "ylabel": "y", "lines": lines},
        {"kind": "table", "title": "b", "columns": ["c", "d"], "rows": [["<b>e", "1.5"]]},
    ]
    results = {"verification": {"title": "Verification", "note": "n", "blocks": blocks}}
    return report_page(Pack(data), tmp_path_factory.mktemp("page") / "report.html", results)


def hover(page, patch: int, rows: int = 7, cols: int = 9) -> None:
    """Points at the middle of a patch with a real pointer."""
    place = page.locator(".box canvas").bounding_box()
    row, col = divmod(patch, cols)
    x = place["x"] + (col + 0.5) / cols * place["width"]
    page.mouse.move(x, place["y"] + (row + 0.5) / rows * place["height"])
    settle(page)


def shares(page) -> list[float]:
    return [float(share) for share in page.locator(".probe").get_attribute("data-share").split(",")]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.where(rows.any(-1), rows.sum(-1), 1)[:, None]


def test_values_at_the_pointer_are_those_of_the_arrays(report, data):
    with opened(report) as page:
        for patch in (5, 17, 40):
            hover(page, patch)
            wanted = unit(data["combined_interaction"].values[0])[patch, patch]
            np.testing.assert_allclose(shares(page), [wanted], rtol=0.05)
            assert page.locator(".probe").get_attribute("data-patch") == str(patch)
        page.mouse.click(*middle(page))  # pins the one in the middle
        for layer in (0, 11):
            page.locator("select").last.select_option(str(layer))
            settle(page)
            hover(page, 20)
            row = data["interaction"].sel(layer=layer).values[0]
            np.testing.assert_allclose(shares(page), [unit(row)[31, 20]], atol=0.01 * row.max())
        page.get_by_label("indicator").select_option("edge")
        settle(page)
        hover(page, 3)
        page.mouse.down()
        page.mouse.up()
        hover(page, 33)
        turned = unit(data["other_interaction"].sel(other="edge", layer=11).values[0])
        np.testing.assert_allclose(shares(page), turned[[31, 3], 33], atol=0.01 * turned.max())


def middle(page) -> tuple[float, float]:
    place = page.locator(".box canvas").bounding_box()
    return place["x"] + place["width"] / 2, place["y"] + place["height"] / 2


def test_windows_and_fields_are_those_of_python_on_the_same_numbers(report, data):
    layout = TokenLayout(7, 9, 0)
    pack = Pack(data)
    with opened(report) as page:
        for layer in ("all", "0", "5", "11"):
            rows = unpacked(pack.blob(f"1/leave_one_out/{layer}"), 63, 8)
            found = page.evaluate(
                """async ([layer]) => {
                  const map = await viewer.maps.map(1, "leave_one_out", layer);
                  const { rows, cols } = viewer.meta, all = [...Array(63).keys()];
                  const row = (i) => map.shares.subarray(63 * i, 63 * (i + 1));
                  const { smallestWindow, field } = viewer.numbers;
                  const windows = [0.05, 0.5, 0.9, 1].map(
                    (held) => all.map((i) => smallestWindow(row(i), rows, cols, i, held)));
                  const fields = all.map((i) => field(row(i), rows, cols, i));
                  return { shares: Array.from(map.shares), windows, fields };
                }""",
                [layer],
            )
            np.testing.assert_allclose(
                np.reshape(found["shares"], (63, 63)), unit(rows), rtol=1e-5, atol=1e-9
            )
            windows = smallest_windows(rows, layout, (0.05, 0.5, 0.9, 1.0))
            np.testing.assert_array_equal(found["windows"], windows)
            field = responsive_field(unit(rows), layout)
            for patch, one in enumerate(found["fields"]):
                if one is None:
                    assert not rows[patch].any()
                    continue
                for name in ("tendency", "spread", "axes", "angle", "entropy"):
                    wanted = np.asarray(getattr(field, name))[patch]
                    np.testing.assert_allclose(one[name], wanted, rtol=2e-3, atol=2e-3)


def test_names_stay_text_and_nothing_is_asked_for_elsewhere(report):
    """`opened` fails on a dialog, a word on the console, and any request."""
    with opened(report) as page:
        page.locator(".item").nth(2).click()
        settle(page)
        expect(page.locator(".title")).to_contain_text("<img src=x onerror=alert(1)>.jpg: ")
        expect(page.locator("img[src='x']")).to_have_count(0)
        page.get_by_role("tab", name="Verification").click()
        expect(page.get_by_text("<script>alert(2)</script>")).to_be_visible()
        expect(page.get_by_text("<b>e")).to_be_visible()


def test_a_page_that_comes_slowly_waits_for_whole_maps(report):
    """The first map is cut in the middle for a while, as on a slow disk or line."""
    content = report.read_bytes()
    cut = content.index(b'id="map:0/leave_one_out/all"') + 1000

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content[:cut])
            self.wfile.flush()
            time.sleep(1)
            self.wfile.write(content[cut:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(f"http://127.0.0.1:{server.server_port}/") as page:
            expect(page.get_by_role("alert")).to_be_hidden()
            assert page.evaluate("viewer.failed.size") == 0
        server.shutdown()


def test_keys_filters_and_the_address(report):
    with opened(report) as page:
        canvas = page.locator(".box canvas")
        canvas.focus()
        hover(page, 31)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        page.keyboard.press("]")
        page.keyboard.press("w")
        settle(page)
        assert page.locator(".app").get_attribute("data-patch") == "41,40"
        assert "takes most from" in page.locator("[aria-live]").inner_text()
        page.locator("[type=range]").first.fill("0.55")
        expect(page).to_have_url(re.compile("coverage=0.55"))  # follows with a pause
        shared = page.evaluate("location.hash")
        page.get_by_label("find images").fill("CAT/")
        expect(page.locator(".item:visible")).to_have_count(1)
        page.get_by_label("wrong predictions only").check()
        expect(page.get_by_text("no image fits these filters")).to_be_visible()
        canvas.press("?")
        expect(page.get_by_role("dialog", name="help")).to_be_visible()
    with opened(report.as_uri() + shared) as page:
        assert page.locator(".app").get_attribute("data-patch") == "41,40"
        state = page.evaluate("viewer.state")
        assert (state["layer"], state["coverage"], state["on"]["window"]) == (0, 0.55, False)
    with opened(
        report.as_uri() + "#image=99&layer=x&pins=1.2,88.1,&show=nope:3&coverage=-4"
    ) as page:
        state = page.evaluate("viewer.state")
        assert (state["image"], state["layer"], state["pins"]) == (2, "all", [11])


def test_exports_open(report, tmp_path):
    with opened(
        report.as_uri() + "#show=received:0.7,wheel:0.5,arrows:1,ellipse:1&removed=0.3"
    ) as page:
        for kind in ("png", "svg"):
            with page.expect_download() as download:
                page.locator(f"[data-act={kind}]").click()
            download.value.save_as(tmp_path / f"view.{kind}")
    with Image.open(tmp_path / "view.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1200 and pixels.std() > 20
    text = (tmp_path / "view.svg").read_text("utf-8")
    assert "share of the row" in text and "<ellipse" in text
    assert len(text) > 10_000


def test_a_phone_sees_everything(report):
    with opened(report, 360, 740) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator(".box canvas").bounding_box()["width"] > 300


def test_a_large_grid(tmp_path):
    """1,369 patches: as right as a small one."""
    rng = np.random.default_rng(0)
    rows = (rng.exponential(size=(1369, 1369)) ** 2).astype(np.float32)
    made = make_dataset(4, 4, layers=(0,), names=("a.jpg",), picture=False)
    keep = made[["prediction", "probability", "score"]]
    large = keep.assign(
        interaction=(("image", "layer", "query", "key"), rows[None, None]),
        combined_interaction=(
            ("image", "query", "key"),
            (rows / rows.sum(-1, keepdims=True))[None],
        ),
        received_impact=(("image", "layer", "row", "col"), rows.sum(0).reshape(1, 1, 37, 37)),
        combined_received_impact=(("image", "row", "col"), rows.sum(0).reshape(1, 37, 37)),
    )
    path = report_page(Pack(large), tmp_path / "large.html")
    with opened(path) as page:
        hover(page, 700, 37, 37)
        np.testing.assert_allclose(shares(page), [rows[700, 700] / rows[700].sum()], rtol=0.05)
        back = unpacked(Pack(large).blob("0/leave_one_out/0"), 1369, 8)
        some = [0, 700, 1368]
        found = page.evaluate(
            """async (some) => {
              const map = await viewer.maps.map(0, "leave_one_out", 0);
              return some.map((i) => viewer.numbers.smallestWindow(
                map.shares.subarray(1369 * i, 1369 * (i + 1)), 37, 37, i, 0.9));
            }""",
            some,
        )
    wanted = np.asarray(smallest_windows(back, TokenLayout(37, 37, 0), 0.9))[some]
    np.testing.assert_array_equal(found, wanted)
