"""The interactive report: one HTML file that needs nothing else, and the script it shares.

The viewer is written as ES modules in `static/`. A page that works from a file, and a notebook
widget, both want one script, so `viewer_script` puts them one after the other; the modules keep to
named imports of siblings on one line and to names of their own, which a test checks.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vit_interact.viz.pack import Pack

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) )", re.MULTILINE)


@functools.cache
def viewer_script(main: str = "view") -> str:
    """A module of `static/` and all that it imports, as one script.

    Args:
      main: "view", which defines `mount` and `fromBase64` among others, or "widget".
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        text = _static(f"{name}.js")
        for needed in _IMPORT.findall(text):
            add(needed)
        done[name] = _EXPORT.sub("", _IMPORT.sub("", text))

    add(main)
    return "\n".join(done.values())


def viewer_style() -> str:
    """The viewer's style sheet."""
    return _static("style.css")


def _static(name: str) -> str:
    return resources.files("vit_interact.viz").joinpath("static", name).read_text("utf-8")


def report_page(
    pack: Pack,
    path: str | os.PathLike[str],
    results: dict[str, Any] | None = None,
    advance: Callable[[float], None] = lambda images: None,
) -> Path:
    """Writes the report; the maps go to disk one by one, so memory holds few of them.

    Args:
      pack: what to show.
      path: the file to write, replaced when it is complete.
      results: tabs beside the images, from `vit_interact.viz.results`.
      advance: called with a number of images whenever they are written.

    Returns:
      The path written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    parts = _template().generate(
        title=pack.model,
        data=_json({"meta": pack.meta(), "results": results or {}, "css": viewer_style()}),
        script=Markup(viewer_script()),  # ours; nothing of a user is in it
        blobs=_blobs(pack, advance),
    )
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    os.replace(unfinished, target)
    return target


def _blobs(pack: Pack, advance: Callable[[float], None]) -> Iterator[tuple[str, str]]:
    share = len(pack.scenes) / len(list(pack.keys()))
    for key, blob in pack.blobs():
        yield key, base64.b64encode(blob).decode()
        advance(share)


def _json(value: Any) -> Markup:
    """JSON that no text in it can end: `<`, `>` and `&` are written as codes."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vit_interact.viz"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
