"""What the viewer gets, without a browser."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import xarray as xr
from made_up import make_dataset

from vit_interact.interactions import smallest_windows
from vit_interact.layout import TokenLayout
from vit_interact.viz.pack import Pack, dequantise, fitting, quantise
from vit_interact.viz.page import report_page, viewer_script
from vit_interact.viz.results import survey_tab, verification_tab


def unpacked(blob: bytes, patches: int, bits: int) -> np.ndarray:
    """What the page makes of a map, in NumPy."""
    data = zlib.decompress(blob)
    scale = np.frombuffer(data[: 4 * patches], "<f4")
    parts = np.frombuffer(data[4 * patches :], np.uint8).reshape(-1, patches, patches)
    if bits == 8:
        return dequantise(parts[0], scale)
    return dequantise(parts[0].astype(np.uint16) * 256 + parts[1], scale)


def with_others(data: xr.Dataset, *names: str) -> xr.Dataset:
    """The same maps again, turned over, as further indicators."""
    extra = {}
    for name in ("interaction", "received_impact"):
        for variable in (name, f"combined_{name}"):
            turned = data[variable][..., ::-1, ::-1].expand_dims(other=list(names), axis=1)
            extra[f"other_{variable}"] = turned
    return data.assign(extra)


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_small_for_entries_and_for_sums(bits):
    rng = np.random.default_rng(0)
    rows = (rng.exponential(size=(40, 256)) ** 3).astype(np.float32)
    rows[3] = 0
    rows[4] = np.nan
    found, scale = quantise(rows, bits)
    back = dequantise(found, scale)
    levels = 2**bits - 1
    assert found.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert not back[3:5].any() and scale[3] == scale[4] == 0
    rows = np.nan_to_num(rows)
    # A step of the root is at most 2/levels of the largest entry, the carry another.
    assert np.abs(back - rows).max() <= (2.5 / levels * rows.max(-1)).max()
    runs = np.abs(np.cumsum(back - rows, -1)).max(-1)
    assert (runs <= 1.5 / levels * rows.max(-1) + 1e-5 * rows.sum(-1)).all()
    # Small entries keep their digits: one in 1000 of the largest.
    small = np.where(rows < 1e-3 * rows.max(-1, keepdims=True), rows, np.nan)
    plain = np.rint(rows / rows.max(-1, keepdims=True).clip(1e-9) * levels) / levels
    plain *= rows.max(-1, keepdims=True)
    assert np.nanmean(np.abs(back - small)) < np.nanmean(np.abs(plain - small))


@pytest.mark.parametrize("bits", [8, 16])
def test_blobs_hold_what_was_measured(bits, square, monkeypatch):
    data = with_others(square, "edge", "attention")
    pack = Pack(data, bits)
    keys = list(pack.keys())
    assert len(keys) == len(set(keys)) == 2 * (3 * (2 + 3) + 1)
    for key in keys:
        image, name, *rest = key.split("/")
        if name == "predicted":
            found = np.frombuffer(zlib.decompress(pack.blob(key)), "<f4").reshape(2, 1, 64, 4)
            np.testing.assert_array_equal(found, data["predicted_window"][int(image)])
            continue
        layer = rest[0]
        if layer == "impact":
            found = np.frombuffer(zlib.decompress(pack.blob(key)), "<f4").reshape(4, 64)
            own = data.isel(image=int(image))
            prefix = "" if name == "leave_one_out" else "other_"
            wanted = own[f"{prefix}combined_received_impact"]
            if prefix:
                wanted = wanted.sel(other=name)
            np.testing.assert_array_equal(found[0], wanted.values.ravel().astype(np.float32))
            continue
        wanted = np.nan_to_num(pack.map(int(image), name, layer))
        close = 0.012 if bits == 8 else 5e-5
        found = unpacked(pack.blob(key), 64, bits)
        assert (np.abs(found - wanted).max(-1) <= close * wanted.max(-1)).all(), key
    for several in (1, 3, 1000):
        monkeypatch.setattr("vit_interact.viz.pack._TOGETHER", several * 64**2)
        assert list(pack.blobs()) == [(key, pack.blob(key)) for key in keys]
    for wrong in ("7/edge/0", "0/nope/0", "0/edge/17", "0/edge/all/1", "x"):
        with pytest.raises(KeyError):
            pack.blob(wrong)


def test_windows_differ_as_little_as_is_said(square):
    pack = Pack(square)
    agreement = pack.agreement()
    layout = TokenLayout(8, 8, 0)
    differ, off = [], []
    for layer in ("all", 0, 5, 11):
        for image in (0, 1):
            rows = np.nan_to_num(pack.map(image, "leave_one_out", layer))
            back = dequantise(*quantise(rows))
            two = [np.asarray(smallest_windows(one, layout, 0.9)) for one in (rows, back)]
            differ.append((two[0] != two[1]).any(-1).mean())
            off.append((np.abs(rows - back).max(-1) / rows.max(-1)).max())
    assert agreement.compared == 8 * 64 and agreement.coverage == 0.9
    np.testing.assert_allclose(agreement.differ, np.mean(differ))
    np.testing.assert_allclose(agreement.error, max(off))
    assert 1e-4 < agreement.error < 0.012  # a step of 8 bits and the carry
    assert Pack(square, 16).agreement().differ <= agreement.differ < 0.05


def test_meta_names_classes_and_labels(square):
    names = np.array(["a/crab/1.jpg", "dalmatian/2.jpg"], dtype=object)
    data = square.assign_coords(image=names)
    meta = Pack(data).meta()
    assert [image["label"] for image in meta["images"]] == ["crab", "dalmatian"]
    assert meta["images"][0]["picture"].startswith("data:image/jpeg;base64,")
    assert (meta["rows"], meta["cols"], meta["layers"]) == (8, 8, [0, 5, 11])
    assert len(base64.b64decode(meta["colors"]["impact"])) == 3 * 256
    json.dumps(meta, allow_nan=False)


def test_pages_stay_below_their_size():
    def sizes(**dims: int) -> xr.Dataset:
        return xr.Dataset({name: (name, np.zeros(size, bool)) for name, size in dims.items()})

    assert fitting(sizes(image=24, query=256, layer=12, other=2)) == 24
    assert fitting(sizes(image=24, query=1369, layer=12, other=2)) == 1
    assert fitting(sizes(image=24, query=1369, layer=12)) == 2
    assert fitting(sizes(image=3, query=64, layer=12)) == 3


def test_a_page_is_one_file_and_text_stays_text(tmp_path, square):
    evil = "</script><script>alert(1)</script>"
    data = square.assign_coords(image=np.array([evil, "b & 'c'.jpg"], dtype=object))
    data.attrs["model"] = evil
    path = report_page(Pack(data), tmp_path / "page.html")
    text = path.read_text("utf-8")
    assert not (tmp_path / "page.html.unfinished").exists()
    assert "<script>alert" not in text and "alert(1)</script>" not in text
    assert text.count("<script") == text.count("</script>") == 2 + len(list(Pack(data).keys()))
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert "default-src 'none'" in text
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert held["meta"]["images"][0]["name"] == evil


@pytest.mark.parametrize("main", ["view", "widget"])
def test_modules_become_one_script(main):
    script = viewer_script(main)
    assert "import " not in re.sub(r"//.*", "", script)
    assert re.findall(r"^export .*", script, re.MULTILINE) == (
        ["export default {"] if main == "widget" else []
    )
    defined = re.findall(r"^(?:async )?(?:function|const|let|class) \[?(\w+)", script, re.MULTILINE)
    assert len(defined) == len(set(defined)), "two modules define the same name"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.drop_vars("interaction"), "no variable interaction"),
        (lambda data: data.isel(image=slice(0)), "holds no images"),
    ],
)
def test_what_is_no_analysis(square, change, words):
    with pytest.raises(ValueError, match=words):
        Pack(change(square))
    with pytest.raises(ValueError, match="expected 8 or 16"):
        Pack(square, 12)


def test_tabs_refuse_what_they_are_not_of(square):
    with pytest.raises(ValueError, match=r"no verify\.json"):
        verification_tab({"arms": 3})
    with pytest.raises(ValueError, match="no store of vit-interact statistics"):
        survey_tab(make_dataset())
