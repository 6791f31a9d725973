"""Makes a process ready to draw: imported by those that `vit_interact.drawing` starts.

What the first figure would wait for, fonts above all, is there before there is a figure.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
import io
import string

from vit_interact.processes import collect_seldom, end_with_parent_at_once

# Before the imports that take long.
collect_seldom()
end_with_parent_at_once()

import numpy as np
from matplotlib.figure import Figure

from vit_interact.viz import figures, style
from vit_interact.viz.png import render

__all__ = ["figures"]


@style.styled
def _draw_something() -> None:
    figure = Figure(figsize=(2, 2), dpi=style.DPI)
    axes = figure.add_subplot(title="title", xlabel="label", ylabel="label")
    figure.colorbar(axes.imshow(np.zeros((2, 2), np.float32)))
    for size in (12.5, 13, 13.5):
        axes.text(0, 0, string.printable.strip().replace("$", ""), fontsize=size)
    render(figure).save(io.BytesIO(), format="PNG")


_draw_something()
# Processes that are forked from this one share what does not change.
gc.freeze()
