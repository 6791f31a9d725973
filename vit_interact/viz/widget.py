"""`vi.show`: the viewer of the report inside Jupyter, VS Code and Colab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vit_interact.viz.pack import Pack
from vit_interact.viz.page import viewer_script, viewer_style

if TYPE_CHECKING:
    import xarray as xr


def show(data: xr.Dataset, bits: int = 8, results: dict[str, Any] | None = None) -> Any:
    """Shows an analysis in a notebook; what is chosen there is known here, and the other way round.

    Args:
      data: of `vi.analyze_files`, of `vi.analyze` (a `picture` variable, uint8, brings the
        photographs) or `xarray.open_zarr(".../analysis.zarr")`. Maps are sent when they are looked
        at.
      bits: 8, or 16 for closer values.
      results: further tabs, of `vit_interact.viz.results`.

    Returns:
      An anywidget with the traits `image` (number), `indicator` (name), `layer` (number or "mean"),
      `patch` (row-major number of the chosen patch, or None) and `pins` (of both when two are
      compared). Setting one of the first four moves the view; `widget.patch = 17` pins.

    Raises:
      ValueError: if `data` is no analysis.
      ImportError: without anywidget, with the command that installs it.
    """
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError(
            'vi.show needs anywidget: pip install "vit-interact[notebook]"'
        ) from error

    pack = Pack(data, bits)
    patches = pack.scenes[0].patches
    layers = ["mean", *pack.scenes[0].layers]

    class Viewer(anywidget.AnyWidget):
        """The viewer; see `vi.show`."""

        _esm = viewer_script("widget")
        _meta = traitlets.Dict().tag(sync=True)
        _css = traitlets.Unicode().tag(sync=True)
        _results = traitlets.Dict().tag(sync=True)
        image = traitlets.Int(0, min=0, max=len(pack.scenes) - 1).tag(sync=True)
        indicator = traitlets.Enum(pack.indicators, pack.indicators[0]).tag(sync=True)
        layer = traitlets.Enum(layers, "mean").tag(sync=True)
        patch = traitlets.Int(None, min=0, max=patches - 1, allow_none=True).tag(sync=True)
        pins = traitlets.List(traitlets.Int(), read_only=False).tag(sync=True)

    widget = Viewer(_meta=pack.meta(), _css=viewer_style(), _results=results or {})

    def answer(_: Any, content: dict[str, Any], __: Any) -> None:
        key = str(content.get("key"))
        try:
            blob = pack.blob(key)
        except Exception as error:  # told where it was asked for: a comm has no traceback
            widget.send({"key": key, "error": f"{type(error).__name__}: {error}"})
        else:
            widget.send({"key": key}, buffers=[blob])

    widget.on_msg(answer)
    return widget
