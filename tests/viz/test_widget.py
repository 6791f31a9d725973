"""`vi.show` in a real browser: the Python widget at one end, its page at the other.

Only the wire between them is ours here, and it speaks the protocol of Jupyter widgets; notebooks
that run in a real kernel are in test_colabs.py.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any, ClassVar

import numpy as np
import pytest
import xarray as xr
from browser import opened
from made_up import make_dataset
from test_pack import with_others

import vit_interact as vi

pytest.importorskip("anywidget")
comm = pytest.importorskip("comm")
pytestmark = pytest.mark.slow

# What a notebook does with a widget: imports its module from text, gives it a model and an element.
PAGE = """<!doctype html><meta charset="utf-8"><body><div id="host"></div>
<script>
const state = STATE, handlers = {}, changed = {};
const tell = (name, ...rest) => (handlers[name] ?? []).forEach((handler) => handler(...rest));
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = changed[name] = value; },
  save_changes: () => {
    python({ method: "update", state: { ...changed } });
    for (const name in changed) delete changed[name];
  },
  send: (content) => python({ method: "custom", content }),
  on: (name, handler) => { (handlers[name] ??= []).push(handler); },
  off: (name, handler) => { handlers[name] = handlers[name].filter((one) => one !== handler); },
};
function receive(data, buffers) {
  if (data.method === "update") {
    Object.assign(state, data.state);
    for (const name in data.state) tell(`change:${name}`);
  } else if (data.method === "custom") {
    const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    tell("msg:custom", data.content, buffers.map((text) => new DataView(bytes(text).buffer)));
  }
}
addEventListener("load", async () => {
  const address = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
  const { default: widget } = await import(address);
  globalThis.leave = await widget.render({ model, el: document.getElementById("host") });
});
</script>"""


class Wire(comm.base_comm.BaseComm):
    """A comm that keeps what Python says until the page is given it."""

    said: ClassVar[list[tuple[dict[str, Any], list[bytes]]]] = []

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **keys):
        if msg_type == "comm_msg":
            Wire.said.append((data, [bytes(buffer) for buffer in buffers or []]))


@pytest.fixture
def data() -> xr.Dataset:
    return with_others(make_dataset(7, 9, names=("a.jpg", "b.jpg")), "edge")


@pytest.fixture
def widget(data, monkeypatch):
    monkeypatch.setattr(comm, "create_comm", Wire)
    monkeypatch.setattr(Wire, "said", [])
    return vi.show(data)


def talk(page: Any, until: str) -> None:
    """Carries messages to the page until an element is there."""
    end = time.monotonic() + 30
    while not page.locator(until).count():
        assert time.monotonic() < end, f"{until} does not come"
        while Wire.said:
            message, buffers = Wire.said.pop(0)
            texts = [base64.b64encode(buffer).decode() for buffer in buffers]
            page.evaluate("([data, buffers]) => receive(data, buffers)", [message, texts])
        page.wait_for_timeout(20)


def until(page: Any, holds: Any) -> None:
    """Waits for what the page sends to Python."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def test_what_is_chosen_goes_both_ways(widget, data, tmp_path):
    widget.layer, widget.patch = 5, 17  # before anybody looks
    state = widget.get_state()
    path = tmp_path / "widget.html"
    text = json.dumps(state, default=str).replace("<", "\\u003c")
    path.write_text(PAGE.replace("STATE", text), "utf-8")

    def python(message: dict[str, Any]) -> None:
        content = {"data": {"buffer_paths": [], **message}}
        widget.comm.handle_msg({"content": content, "buffers": []})

    with opened(path, ready=False, functions={"python": python}) as page:
        talk(page, '.app[data-ready][data-patch="17"]')
        assert page.evaluate("state.layer") == 5
        # The values are those of the arrays, which came over the wire.
        row = data["interaction"].sel(layer=5).values[0, 17]
        place = page.locator(".box canvas").bounding_box()
        x, y = (place["x"] + 4.5 / 9 * place["width"], place["y"] + 3.5 / 7 * place["height"])
        page.mouse.move(x, y)
        talk(page, '.probe[data-patch="31"]')
        share = float(page.locator(".probe").get_attribute("data-share"))
        np.testing.assert_allclose(share, row[31] / row.sum(), atol=0.01 * row.max() / row.sum())

        layer = page.locator(".controls select").nth(1)
        page.mouse.click(x, y)  # a second pin
        until(page, lambda: widget.pins == [17, 31])
        layer.select_option("11")
        until(page, lambda: widget.layer == 11)
        layer.select_option("all")
        until(page, lambda: widget.layer == "mean")
        page.get_by_label("indicator").select_option("edge")
        until(page, lambda: widget.indicator == "edge")
        page.locator(".item").nth(1).click()
        until(page, lambda: (widget.image, widget.pins) == (1, []))

        widget.patch, widget.layer = 3, 0
        talk(page, '.app[data-ready][data-patch="3"]')
        assert layer.input_value() == "0"
        until(page, lambda: widget.pins == [3])
        widget.image = 0
        talk(page, '.item[aria-current="true"]:has-text("a.jpg")')
        page.evaluate("leave()")
        assert page.evaluate("Object.values(handlers).every((some) => some.length === 0)")


def test_python_refuses_what_is_not_there(widget):
    for name, value in (("layer", 3), ("patch", 63), ("image", 2), ("indicator", "attention")):
        with pytest.raises(Exception, match=name):
            setattr(widget, name, value)
