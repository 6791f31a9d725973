"""Figures as PNG files of a modest size."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

#: PNG files larger than this are written with larger steps between the levels of a channel.
MOST_BYTES = 480_000
LEVELS = (1, 8, 16)
COARSE = LEVELS[1:]


def save(figure: Figure, path: Path, steps: Sequence[int] = LEVELS) -> Path:
    """Writes a figure as a PNG, through a temporary file so that it is whole or not there.

    Heat over photographs compresses badly. Steps of 8 between the levels of a channel are hard to
    see, while palettes left false contours in faces.

    Args:
      figure: what to write.
      path: where to.
      steps: steps between levels of a channel, tried in turn until the file has at most
        `MOST_BYTES`; the last is taken in any case.

    Returns:
      `path`.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    size = canvas.get_width_height()
    pixels = Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    pixels = pixels.convert("RGB")
    for step in steps:
        levels = np.minimum((np.arange(256) + step // 2) // step * step, 255)
        buffer = io.BytesIO()
        # Level 4 takes half the time of the usual 6 for 4 % more bytes.
        pixels.point(levels.tolist() * 3).save(buffer, format="PNG", compress_level=4)
        if buffer.tell() <= MOST_BYTES:
            break
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(buffer.getvalue())
    os.replace(unfinished, path)
    return path


def pixels(figure: Figure, dpi: int) -> np.ndarray:
    """A drawn figure as uint8 `[h, w, 3]`."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
