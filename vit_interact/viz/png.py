"""Figures as PNG or JPEG files of a modest size."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

#: Files larger than this are written with larger steps between the levels of a channel.
MOST_BYTES = 480_000
LEVELS = (1, 8, 16)
COARSE = LEVELS[1:]
#: For figures without photographs: nothing is lost, or else 256 colours fitted to the figure.
FLAT = (1, 0)

_QUALITIES = (90, 80, 70, 60, 50)


def save(
    figure: Figure, path: Path, steps: Sequence[int] = LEVELS, most: int | None = None
) -> Path:
    """Writes a figure as a PNG or JPEG, through a temporary file so that it is whole or not there.

    Heat over photographs compresses badly. Steps of 8 between the levels of a channel are hard to
    see, while palettes left false contours in faces. Curves and plain maps look the same in 256
    colours, at less than half the bytes.

    Args:
      figure: what to write.
      path: where to; a JPEG where its name ends in `.jpg`.
      steps: steps between levels of a channel of a PNG, or 0 for a palette, tried in turn until
        the file has at most `most` bytes; the last is taken in any case.
      most: bytes; `MOST_BYTES` if None.

    Returns:
      `path`.
    """
    return write(render(figure), path, steps, most)


def render(figure: Figure) -> Image.Image:
    """A figure's picture, RGB."""
    canvas = _drawn(figure)
    size = canvas.get_width_height()
    return Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")


def write(
    pixels: Image.Image, path: Path, steps: Sequence[int] = LEVELS, most: int | None = None
) -> Path:
    """The part of `save` after `render`: it leaves the interpreter to other threads meanwhile."""
    for content in _jpegs(pixels) if path.suffix == ".jpg" else _pngs(pixels, steps):
        if len(content) <= (MOST_BYTES if most is None else most):
            break
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return path


def _pngs(pixels: Image.Image, steps: Sequence[int]) -> Iterator[bytes]:
    """The picture at each of the steps between the levels of a channel."""
    for step in steps:
        if step:
            levels = np.minimum((np.arange(256) + step // 2) // step * step, 255)
            reduced = pixels.point(levels.tolist() * 3)
        else:
            # Means of clusters: plain median cuts leave steps in colour bars, and a palette by
            # coverage alone tints pale bands.
            reduced = pixels.quantize(
                method=Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE
            )
        buffer = io.BytesIO()
        # Level 4 takes half the time of the usual 6 for 4 % more bytes; palettes are quick anyway.
        reduced.save(buffer, format="PNG", compress_level=4 if step else 9)
        yield buffer.getvalue()


def _jpegs(pixels: Image.Image) -> Iterator[bytes]:
    """The picture at ever lower quality."""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        pixels.save(buffer, format="JPEG", quality=quality, optimize=True, progressive=True)
        yield buffer.getvalue()


def pixels(figure: Figure, dpi: int) -> np.ndarray:
    """A drawn figure as uint8 `[h, w, 3]`."""
    figure.set_dpi(dpi)
    return np.asarray(_drawn(figure).buffer_rgba())[..., :3].copy()


def _drawn(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    # Glyphs fitted to whole pixels are no easier to read here and take a sixth of the time.
    with mpl.rc_context({"text.hinting": "none"}):
        canvas.draw()
    return canvas
