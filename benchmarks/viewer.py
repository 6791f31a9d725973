"""The interactive report in headless Chromium: size, first view, what pointing at a patch costs.

    python -m benchmarks.viewer [--json] [--images 24] [--indicators attention,leave_one_out,edge]

Makes reports of the embedded model and photographs: `--images` of them at 224 pixels with all
layers, and one at 518 pixels, 1,369 patches, with one layer. `script_ms` is the median over patches
of the page's own work for a new patch, from the pointer's event to the end of its drawing;
`task_ms` is the mean of all of the main thread's work for it, layout and painting included. Needs a
Chromium and `pip install -e ".[browser]"`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.viz.pack import Pack
from vit_interact.viz.page import report_page

_READY = ".app[data-ready]"
# Points at patches far from one another. The first frame callback runs before the view's, the
# second one after it.
_POINT = """async (canvas, [count, patches]) => {
  const app = canvas.closest(".app");
  const place = canvas.getBoundingClientRect(), side = Math.sqrt(patches), found = [];
  for (let i = 0; i < count; i++) {
    const patch = (i * 97) % patches;
    const at = (k, size) => (k + 0.5) / side * size;
    const event = new PointerEvent("pointermove", { bubbles: true,
      clientX: place.x + at(patch % side, place.width),
      clientY: place.y + at(Math.floor(patch / side), place.height) });
    let begun;
    requestAnimationFrame(() => { begun = performance.now(); });
    const sent = performance.now();
    canvas.dispatchEvent(event);
    const handled = performance.now() - sent;
    const drawn = await new Promise((done) =>
      requestAnimationFrame(() => done(performance.now() - begun)));
    found.push(handled + drawn);
    while (!app.hasAttribute("data-ready")) await new Promise(requestAnimationFrame);
  }
  return found;
}"""


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=100)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--indicators", type=common.some_of(tuple(vx.INDICATORS)),
                        default=["attention", "leave_one_out", "edge"])  # fmt: skip
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium here: install Debian's package of that name, or another")
    from playwright.sync_api import sync_playwright

    fixed = {"indicators": options.indicators, "window": "1400x1000"}
    report = common.Report("viewer", fixed, ("playwright",))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        # Inside containers Chromium's own sandbox is not permitted.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        report.setting["versions"]["chromium"] = browser.version
        for pixels, images, layers in ((224, options.images, None), (518, 1, (0,))):
            path = _make(Path(folder), pixels, images, options.indicators, layers)
            for row in _look(browser, path, (pixels // 14) ** 2, options.repeats):
                report.add(images=images, **row)
        browser.close()
    report.show(options.json)


def _make(
    folder: Path, pixels: int, images: int, indicators: list[str], layers: tuple[int, ...] | None
) -> Path:
    """Measures and writes a report."""
    weights = vi.load_checkpoint("vit_s14_caltech101", image_size=pixels)
    files = [sample.path for sample in vi.sample_images(images)]
    data = vi.analyze_files(weights, files, indicators, layers=layers)
    return report_page(Pack(data), folder / f"{pixels}.html")


def _look(browser: Any, path: Path, patches: int, repeats: int) -> list[common.Row]:
    """Opens the report, then points at patches with its usual overlays, and with all of them."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    metrics = page.context.new_cdp_session(page)
    metrics.send("Performance.enable")
    began = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector(_READY)
    first = time.perf_counter() - began
    canvas = page.locator(".box canvas")
    rows = []
    for overlays in ("usual", "all"):
        if overlays == "all":
            for switch in page.locator("[data-overlay]").all():
                if switch.is_visible() and switch.is_enabled():
                    switch.check()
            page.wait_for_selector(_READY)
        canvas.evaluate(_POINT, [10, patches])
        before = _task_seconds(metrics)
        times = canvas.evaluate(_POINT, [repeats, patches])
        rows.append({
            "patches": patches,
            "overlays": overlays,
            "script_ms": statistics.median(times),
            "script_ms_95": statistics.quantiles(times, n=20)[-1],
            "task_ms": (_task_seconds(metrics) - before) / repeats * 1000,
        })  # fmt: skip
    page.close()
    rows[0] |= {"file_mb": path.stat().st_size / 1e6, "first_view_s": first}
    return rows


def _task_seconds(metrics: Any) -> float:
    found = metrics.send("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in found if one["name"] == "TaskDuration"))


if __name__ == "__main__":
    main()
