"""Finds image files and decodes whatever people have into plain RGB."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# What is picked up inside folders. Files named one by one are tried whatever they are called.
EXTENSIONS = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
# Where Pillow itself refuses (twice its MAX_IMAGE_PIXELS); 0.5 GB once decoded.
MAX_PIXELS = 178_956_970


class ImageError(ValueError):
    """An image that cannot be used; says which file, what is wrong and what was expected.

    Attributes:
      path: the file, or the name of what is not a file of its own.
      reason: what is wrong with it, without the file's name.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def find_images(inputs: Iterable[str | Path]) -> list[Path]:
    """Files to read, in the order given, each once.

    Args:
      inputs: files, folders (searched to any depth, sorted, known image extensions only, hidden
        files left out) and glob patterns (`**` allowed, sorted). A file named outright is kept
        whatever its extension, so that what it is can be reported.

    Raises:
      ValueError: for a path that does not exist, a pattern that matches nothing, or a folder
        without images.
    """
    found: dict[str, Path] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            files = _inside(path)
            if not files:
                raise ValueError(
                    f"{given}: the folder holds no images ({' '.join(sorted(EXTENSIONS))})"
                )
        elif path.exists() or path.is_symlink():
            files = [path]
        else:
            files = [
                match for name in sorted(glob.glob(str(path), recursive=True))
                for match in (_inside(Path(name)) if Path(name).is_dir() else [Path(name)])
            ]  # fmt: skip
            if not files:
                raise ValueError(f"{given}: no such file, folder or pattern with a match")
        for file in files:
            # `a.png`, `./a.png` and `b/../a.png` are one file; a link to it is another name.
            found.setdefault(os.path.join(os.path.realpath(file.parent), file.name), file)
    if not found:
        raise ValueError("no images given: name files, folders or glob patterns")
    return list(found.values())


def _inside(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes one image file to 8-bit RGB, upright.

    EXIF rotation is applied; transparency is laid on white; the first frame of animations is taken;
    16-bit and float images are scaled, not clipped; CMYK is converted, inverted Adobe JPEGs too.

    Args:
      path: the file.
      max_pixels: refuse larger images before decoding them.

    Raises:
      ImageError: for what cannot be read; its text is one line.
    """
    path = Path(path)
    with _image_errors(path):
        if path.is_dir():
            raise ImageError(path, "is a folder; expected an image file")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(path, "is no regular file; expected an image file")
        if path.stat().st_size == 0:
            raise ImageError(path, "is empty; expected an image file")
        return _decode(path, path, max_pixels)


def decode_image(name: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes one image that is not a file of its own, as `read_image` does.

    Args:
      name: what errors call it.
      content: the encoded image.
      max_pixels: refuse larger images before decoding them.

    Raises:
      ImageError: for what cannot be read; its text is one line.
    """
    with _image_errors(name):
        return _decode(name, io.BytesIO(content), max_pixels)


def _decode(name: Path | str, file: Path | io.BytesIO, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns at half of the limit below, and of damaged EXIF data that nobody needs.
        warnings.simplefilter("ignore")
        fast = _decode_fast(file, max_pixels)
        if fast is not None:
            return fast
        with Image.open(file) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ImageError(
                    name,
                    f"has {image.width}x{image.height} = {pixels / 1e6:.0f} megapixels; the "
                    f"limit is {max_pixels / 1e6:.0f}: resize it first",
                )
            image.load()
            # The transpose must see the EXIF data, which conversions drop.
            return _to_rgb(ImageOps.exif_transpose(image))


def _decode_fast(file: Path | io.BytesIO, max_pixels: int) -> Image.Image | None:
    """An upright RGB JPEG through simplejpeg where that is installed: the same pixels, sooner.

    Pillow feeds its decoder in small pieces and copies rows. All else, and whatever is wrong with a
    file, is left to Pillow by None.
    """
    if not _simplejpeg():
        return None
    content = file.getvalue() if isinstance(file, io.BytesIO) else _whole_jpeg(file)
    try:
        height, width, space, _ = _simplejpeg().decode_jpeg_header(content)
        if space not in ("YCbCr", "RGB") or width * height > max_pixels or _is_turned(content):
            return None
        return Image.fromarray(_simplejpeg().decode_jpeg(content))
    except ValueError:
        return None


def _whole_jpeg(path: Path) -> bytes:
    """The content of a JPEG file, and nothing of another, which may be large."""
    with path.open("rb") as file:
        start = file.read(2)
        return start + file.read() if start == b"\xff\xd8" else b""


def _is_turned(content: bytes) -> bool:
    """Whether a JPEG's EXIF data, or XMP data in their place, say that it is not upright."""
    if b"Exif\0\0" not in content and b"tiff:Orientation" not in content:
        return False  # without Pillow, whose look at a file costs a tenth of decoding it
    with Image.open(io.BytesIO(content)) as image:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


@contextlib.contextmanager
def _image_errors(name: Path | str) -> Iterator[None]:
    """All that reading an image raises, as `ImageError` with a reason for people."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            name, f"is too large to decode safely ({_line(error)}): resize it first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(name, "is not an image that Pillow can read") from error
    except FileNotFoundError as error:
        raise ImageError(name, "does not exist") from error
    except PermissionError as error:
        raise ImageError(name, "may not be read (permission denied)") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError) as error:
        # Pillow's decoders raise all of these for damaged files.
        raise ImageError(name, f"is damaged or cut short ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        # Rounds v / 257 in whole numbers: float64 would take 6 GB for the largest images.
        return Image.fromarray(
            ((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("I", "F"):
        return _scaled(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """32-bit and float greyscale: Pillow's own conversion would clip at 255."""
    values = np.asarray(image, np.float64)
    # Infinite and missing values say nothing about the range of the others.
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no finite pixel")
    values = np.clip(np.nan_to_num(values, nan=finite.min()), finite.min(), finite.max())
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    else:
        low, high = 0.0, 65535.0
        if values.min() < 0 or values.max() > 65535:
            low, high = float(values.min()), float(values.max())
    grey = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
