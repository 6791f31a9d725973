"""A real Chromium for the tests of pages; they skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def opened(
    address: str | Path,
    width: int = 1400,
    height: int = 1000,
    ready: bool = True,
    functions: dict[str, Callable[..., Any]] | None = None,
) -> Iterator[Any]:
    """A page; fails when it says anything on its console or asks for anything elsewhere.

    Args:
      address: a file or a URL.
      width: of the window, in pixels.
      height: of the window, in pixels.
      ready: wait until the page has drawn.
      functions: of Python, that the page can call.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here; .ci/run installs it")
    said: list[str] = []
    url = address.as_uri() if isinstance(address, Path) else address
    with playwright.sync_playwright() as driver:
        # Inside containers Chromium's own sandbox is not permitted.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.accept())
        )

        def asked(request: Any) -> None:
            if not request.url.startswith(("data:", "blob:")) and request.url != url.split("#")[0]:
                said.append(f"request: {request.url}")

        page.on("request", asked)
        for name, function in (functions or {}).items():
            page.expose_function(name, function)
        page.goto(url)
        try:
            if ready:
                settle(page)
        except playwright.TimeoutError:
            status = page.locator(".error").inner_text()
            pytest.fail(f"the page does not become ready: {status!r}, {said}")
        yield page
        browser.close()
    assert said == []


def settle(page: Any) -> None:
    """Waits until what was asked for is drawn: a state is drawn with the frame after it is set."""
    page.wait_for_selector(".app[data-ready]", timeout=30_000)
