"""One look for every drawing: sizes, colours, colour maps, labels and units.

Colour maps are safe for colour-blind readers: sequential ones have monotone lightness, the signed
one goes from purple to orange, the cyclic one (`vit_interact.viz.wheel`) carries half of its
information in lightness. The colours of the indicators are those of Okabe and Ito (2008), which
stay apart under the usual kinds of colour blindness.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Pixels to the inch of every PNG. Layouts are given in pixels at this resolution.
DPI = 100

INK = "#1b1f24"
MUTED = "#5b6570"
FAINT = "#d5dae0"
MISSING = "#c3c9d0"
HIGHLIGHT = "#00e5ff"
#: Of what indicators are compared with. None of them has a colour like it.
CONTROL = "#6b7280"

#: Matplotlib settings inside `styled` functions. Sizes are points: 13 are readable at half size.
RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 13,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    # A fixed place: searching for one that clears the ticks costs a third of the drawing time.
    "axes.titley": 1.0,
    "axes.labelsize": 13,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 12.5,
    "ytick.labelsize": 12.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.fontsize": 12.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.color": "#8a939d",
    "hatch.linewidth": 1.0,
    "image.interpolation": "auto",
}


@dataclasses.dataclass(frozen=True)
class IndicatorStyle:
    """How one indicator is named and coloured everywhere.

    Attributes:
      label: words for titles and legends.
      color: line colour, from Okabe and Ito.
      unit: what one unit of a single layer's indicator is.
    """

    label: str
    color: str
    unit: str


#: The seven indicators of docs/method.md.
INDICATORS: dict[str, IndicatorStyle] = {
    "attention": IndicatorStyle("attention", "#56B4E9", "attention weight"),
    "dispersion": IndicatorStyle("dispersion over heads", "#009E73", "attention weight"),
    "value_norm": IndicatorStyle("value norm", "#E69F00", "norm of the update"),
    "gradient": IndicatorStyle("gradient", "#CC79A7", "units of the score"),
    "leave_one_out": IndicatorStyle("leave one out", "#0072B2", "change of the update"),
    "edge": IndicatorStyle("edge", "#D55E00", "change of the score"),
    "rollout": IndicatorStyle("rollout", "#4D4D4D", "share of the flow"),
}

#: Quantity -> name of a Matplotlib colour map.
COLORMAPS: dict[str, str] = {
    "impact": "inferno",
    "interaction": "inferno",
    "spread": "viridis",
    "area": "cividis",
    "coverage": "cividis",
    "order": "viridis",
    "share": "Blues",
    "signed": "PuOr_r",
}

#: Quantity -> unit, as colour bars and axes print it.
UNITS: dict[str, str] = {
    "spread": "patches",
    "tendency": "patches",
    "area": "share of the grid",
    "coverage": "share of the windows",
    "entropy": "share of log P",
    "interaction": "share of the row",
    "order": "place in the order of removal (1 goes first)",
}

#: Colours of up to nine ellipses on one dark picture, told apart by hue and lightness.
SAMPLE_COLORS = (
    *("#FFFFFF", "#E69F00", "#56B4E9", "#F0E442", "#FF7A45"),
    *("#CC9CE0", "#3DDC97", "#9ED8FF", "#FFB3C7"),
)


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a drawing function: it draws in this style, the caller's settings stay."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return drawn


def indicator_style(name: str) -> IndicatorStyle:
    """The style of an indicator; one that is not of the seven gets its own name and dark ink."""
    return INDICATORS.get(name, IndicatorStyle(name.replace("_", " "), INK, "indicator"))


def combined_unit(name: str) -> str:
    """What one unit of an indicator over all layers is."""
    return INDICATORS["rollout"].unit if name == "rollout" else "layers over their means"


def percent(share: float | np.floating, digits: int = 0) -> str:
    """A share as text, such as `25 %`."""
    return f"{100 * share:.{digits}f} %"


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that the drawing font has."""
    # Only here: pages take colours alone.
    from matplotlib import font_manager

    path = font_manager.findfont(RC["font.family"][0])
    return frozenset(font_manager.get_font(path).get_charmap())


def shorten(text: str, limit: int) -> str:
    """Text for a drawing: one line, only glyphs the font has, cut in the middle beyond `limit`.

    The middle goes because the ends of file names tell them apart.
    """
    if limit < 3:
        raise ValueError(f"limit must be 3 or more characters, got {limit}")
    glyphs = _glyphs()
    clean = "".join(
        char if ord(char) in glyphs and unicodedata.category(char)[0] != "C" else "\N{WHITE SQUARE}"
        for char in " ".join(text.split())
    )
    if len(clean) <= limit:
        return clean
    head = (limit - 1) // 2
    return clean[:head] + "…" + clean[len(clean) - (limit - 1 - head) :]
