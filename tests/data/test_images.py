import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_interact.data import images
from vit_interact.data.images import ImageError, decode_image, find_images, read_image

RAMP = np.linspace(0, 255, 6 * 4).reshape(4, 6).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def saved(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_plain_and_greyscale(tmp_path):
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(COLOUR))), COLOUR)
    grey = pixels(saved(tmp_path, Image.fromarray(RAMP)))
    np.testing.assert_array_equal(grey, np.repeat(RAMP[..., None], 3, axis=-1))
    one = pixels(saved(tmp_path, Image.fromarray(RAMP > 127)))
    assert set(np.unique(one)) == {0, 255}


def test_exif_rotation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    path = saved(tmp_path, Image.fromarray(COLOUR), "x.png", exif=exif)
    np.testing.assert_array_equal(pixels(path), np.rot90(COLOUR, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        path = saved(tmp_path, image, transparency=0)
        expected = [[255, 255, 255], [200, 100, 50]]
    else:
        clear = np.array([[[40, 40, 40, 0], [40, 40, 40, 255]]], np.uint8)
        image = Image.fromarray(clear, "RGBA")
        path = saved(tmp_path, image if mode == "RGBA" else image.convert("LA"))
        expected = [[255, 255, 255], [40, 40, 40]]
    np.testing.assert_array_equal(pixels(path)[0], expected)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = pixels(saved(tmp_path, Image.fromarray(every), "every.png"))[..., 0]
    np.testing.assert_array_equal(found, np.rint(every / 65535 * 255))
    wide = RAMP.astype(np.uint16) * 257
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(wide)))[..., 0], RAMP)
    path = saved(tmp_path, Image.fromarray(wide.astype(np.int32)), "x.tif")
    np.testing.assert_array_equal(pixels(path)[..., 1], RAMP)
    floats = Image.fromarray(RAMP.astype(np.float32) / 255)
    np.testing.assert_array_equal(pixels(saved(tmp_path, floats, "y.tif"))[..., 2], RAMP)


def test_cmyk_and_inverted_adobe_jpeg(tmp_path):
    """Pillow writes Adobe-marked CMYK inverted, as Photoshop does, and reads it back upright."""
    block = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    cmyk = Image.fromarray(block).convert("CMYK")
    for name in ("x.jpg", "x.tif"):
        found = pixels(saved(tmp_path, cmyk, name))
        assert np.abs(found.astype(int) - block).max() < 12


def test_first_frame_of_animations(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (255, 0)]
    path = saved(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert (pixels(path) == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3)])
def test_odd_shapes(tmp_path, size):
    assert read_image(saved(tmp_path, Image.new("RGB", size))).size == size


def bomb(tmp_path):
    """A PNG whose header claims 60,000 x 60,000 pixels in 57 bytes."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    return path


def test_bad_files_are_named_with_the_reason(tmp_path):
    good = saved(
        tmp_path,
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)),
        "g.jpg",
    )
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:900])
    empty = tmp_path / "empty.jpg"
    empty.touch()
    text = tmp_path / "notes.jpg"
    text.write_text("not an image")
    cases = {
        cut: "damaged or cut short",
        empty: "is empty",
        text: "not an image",
        bomb(tmp_path): "too large|megapixels",
        tmp_path: "is a folder",
        tmp_path / "none.png": "does not exist",
    }
    for path, reason in cases.items():
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert str(path) not in caught.value.reason


def test_bytes_are_read_as_files_are(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOUR))
    content = path.read_bytes()
    np.testing.assert_array_equal(np.asarray(decode_image("one", content)), COLOUR)
    for damaged, reason in ((content[:60], "damaged or cut short"), (b"", "not an image")):
        with pytest.raises(ImageError, match=f"^data/one: is {reason}"):
            decode_image("data/one", damaged)
    with pytest.raises(ImageError, match=r"^one: .* resize it first$"):
        decode_image("one", bomb(tmp_path).read_bytes())


def test_limit_is_checked_before_decoding(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (100, 50)))
    with pytest.raises(ImageError, match="100x50"):
        read_image(path, max_pixels=4999)
    assert read_image(path, max_pixels=5000).size == (100, 50)
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own guard stays as it was


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (2, 2)))
    path.chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        read_image(path)


def test_find_images(tmp_path, monkeypatch):
    for name in ("b/2.JPG", "b/1.png", "b/c/3.webp", "b/readme.txt", "b/.hidden/4.png", "a.data"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)

    def found(*inputs):
        return [path.as_posix() for path in find_images(inputs)]

    assert found("b") == ["b/1.png", "b/2.JPG", "b/c/3.webp"]
    assert found("a.data", "b/1.png", "b") == ["a.data", "b/1.png", "b/2.JPG", "b/c/3.webp"]
    assert found("b/*.png") == ["b/1.png"]
    assert found("**/*.webp") == ["b/c/3.webp"]
    for inputs, message in (
        (["nothing.png"], "nothing.png: no such file"),
        (["b/.hidden/*.jpg"], "no such file, folder or pattern"),
        ([], "no images given"),
    ):
        with pytest.raises(ValueError, match=message):
            find_images(inputs)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void: the folder holds no images"):
        find_images(["void"])


def test_infinite_and_missing_floats(tmp_path):
    values = np.array([[0, 1, np.inf], [np.nan, -np.inf, 0.2]], np.float32)
    found = pixels(saved(tmp_path, Image.fromarray(values), "x.tif"))[..., 0]
    np.testing.assert_array_equal(found, [[0, 255, 255], [0, 0, 51]])
    nothing = saved(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "y.tif")
    with pytest.raises(ImageError, match="no finite pixel"):
        read_image(nothing)


def test_one_file_in_several_spellings_is_one(tmp_path, monkeypatch):
    saved(tmp_path, Image.new("RGB", (2, 2)))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(find_images(["x.png", tmp_path / "x.png", "b/../x.png"])) == 1


def test_the_fast_decoder_gives_pillows_pixels(tmp_path, monkeypatch):
    """Upright RGB JPEGs of every subsampling, progressive too; the rest and damage go to Pillow."""
    pytest.importorskip("simplejpeg")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    ).resize((57, 43), Image.Resampling.BICUBIC)
    upright, turned = Image.Exif(), Image.Exif()
    upright[0x0112], turned[0x0112] = 1, 6
    description = b'<rdf:Description tiff:Orientation="3"/>'
    options = [
        {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        for quality in (40, 95) for subsampling in (0, 1, 2) for progressive in (False, True)
    ] + [{"exif": upright}, {"exif": turned}, {"xmp": description}, {"keep_rgb": True}]  # fmt: skip
    paths = [tmp_path / f"{number}.jpg" for number in range(len(options))]
    for path, settings in zip(paths, options, strict=True):
        picture.save(path, **settings)
    picture.convert("L").save(tmp_path / "grey.jpg")
    picture.convert("CMYK").save(tmp_path / "inks.jpg")
    paths += [tmp_path / "grey.jpg", tmp_path / "inks.jpg"]
    fast = [np.asarray(read_image(path)) for path in paths]
    assert fast[-5].shape == (57, 43, 3)
    with pytest.raises(ImageError, match="has 57x43"):
        read_image(paths[0], max_pixels=57 * 43 - 1)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(paths[0].read_bytes()[:-200])
    with pytest.raises(ImageError) as told:
        read_image(cut)
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    for path, pixels in zip(paths, fast, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(read_image(path)), err_msg=path.name)
    with pytest.raises(ImageError) as expected:
        read_image(cut)
    assert str(told.value) == str(expected.value)
