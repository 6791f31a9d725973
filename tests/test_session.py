"""Analysis folders: batches are drawn while others are measured, and figures are a choice."""

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import vit_interact as vi
from tests.cli_data import photographs, tiny_weights
from tests.test_cli import one_error, run
from tests.viz.made_up import make_dataset
from vit_interact.data.images import find_images
from vit_interact.data.naming import Work
from vit_interact.folder import Folder, _chunks
from vit_interact.session import Options, _Behind, analyze_folder


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "out", {}, overwrite=False)


def works(*names):
    return [Work(name, Path(name), "") for name in names]


def drawn(failure=None):
    future = Future()
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)
    return future


def test_batches_count_in_order_one_behind(folder):
    told, second, last = [], Future(), Future()
    with _Behind(folder, told.append) as behind:
        behind.add(works("a", "b"), [drawn(), drawn()])
        assert list(folder.done) == ["a", "b"]  # there is nothing to wait for
        behind.add(works("c"), [second])
        assert list(folder.done) == ["a", "b"]
        second.set_result(None)
        behind.add(works("d"), [last])
        assert list(folder.done) == ["a", "b", "c"]
        last.set_result(None)
    assert list(folder.done) == ["a", "b", "c", "d"] and told == [2, 1, 1]


def test_what_was_measured_counts_when_the_next_batch_fails(folder):
    figures = Future()
    with pytest.raises(ValueError, match="memory"), _Behind(folder, lambda count: None) as behind:
        behind.add(works("a"), [figures])
        figures.set_result(None)
        raise ValueError("memory")
    assert list(folder.done) == ["a"]


def test_after_interrupt_only_what_is_complete_counts(folder):
    with pytest.raises(KeyboardInterrupt), _Behind(folder, lambda count: None) as behind:
        behind.add(works("a"), [Future()])
        raise KeyboardInterrupt
    assert list(folder.done) == []


def test_nothing_counts_after_a_figure_that_failed(folder):
    """Arrays are in the order of the record: a batch left out would shift all later ones."""
    first = Future()
    with pytest.raises(OSError, match="full"), _Behind(folder, lambda count: None) as behind:
        behind.add(works("a"), [first])
        first.set_exception(OSError("disk full"))
        behind.add(works("b"), [drawn()])
    assert list(folder.done) == []


def test_figures_are_a_choice_and_drawn_later_from_the_arrays(tmp_path, monkeypatch):
    weights, images = tiny_weights(tmp_path), photographs(tmp_path / "in", 3)
    command = ("analyze", images, "--model", weights, "--batch-size", "2", "--out")
    out, at_once = tmp_path / "out", tmp_path / "at_once"
    assert "3 analysed" in run(*command, out, "--figures", "none").output
    assert not (out / "images").exists() and (out / "report.html").exists()
    run(*command, at_once, "--figures", "windows")

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("vit_interact.observe.files.analyze_pictures", never)
    told = []
    again = analyze_folder(
        vi.load_checkpoint(weights), find_images([str(images)]), out, Options(), batch_size=2,
        advance=told.append, figures=("windows",),
    )  # fmt: skip
    assert (again.done, again.skipped, told) == (0, 3, [0, 2, 1])
    assert "0 analysed, 3 done before" in run(*command, out, "--figures", "none,windows").output
    for folder in (out, at_once):
        found = sorted((folder / "images").glob("*/*"))
        assert [path.name for path in found] == ["windows.png"] * 3
    for one, other in zip(found, sorted((out / "images").glob("*/*")), strict=True):
        assert one.read_bytes() == other.read_bytes()
    links = (out / "index.html").read_text()
    assert "adaptive windows" in links and "growth with depth" not in links


def test_unknown_figures_are_refused_before_anything_is_done(tmp_path):
    images = photographs(tmp_path / "in", 1)
    message = one_error("analyze", images, "--figures", "window", "--out", tmp_path / "out")
    assert "--figures 'window'" in message and "all,none,received_impact" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chunk", [None, 1], ids=["as now", "as folders of before"])
def test_arrays_of_many_batches_are_in_few_files(folder, chunk, monkeypatch):
    """What is small shares files with that of other images, also when a batch is half full."""
    if chunk:
        monkeypatch.setattr("vit_interact.folder._CHUNK_IMAGES", chunk)
    whole = make_dataset(4, 4, names=tuple(f"{k}.jpg" for k in range(23)))
    whole = whole.assign_coords(image=("image", whole["image"].values.astype(object)))
    for start, stop in ((0, 5), (5, 13)):
        folder.append(whole.isel(image=slice(start, stop)))
        monkeypatch.undo()
    folder.written = 10
    folder._cut_back(10)  # three images did not count
    for start, stop in ((10, 18), (18, 23)):
        folder.append(whole.isel(image=slice(start, stop)))
    with xr.open_zarr(folder.store, consolidated=False) as kept:
        xr.testing.assert_equal(kept.load(), whole)
    files = [path for path in folder.store.glob("*/[0-9]*") if path.parent.name != "image"]
    images = [name for name, variable in whole.data_vars.items() if "image" in variable.dims]
    if not chunk:
        assert len(files) <= 2 * len(images) + len(whole.coords)


def test_chunks_hold_about_as_much_whatever_the_grid():
    def chunks(*shape):
        return _chunks(xr.DataArray(np.broadcast_to(np.float32(0), shape)))

    assert chunks(8, 256) == (16, 256)
    assert chunks(8, 12, 256, 256) == (1, 12, 256, 256)
    assert chunks(8, 12, 1369, 1369) == (1, 1, 765, 1369)
    assert chunks(1, 24, 196, 196) == (1, 24, 196, 196)
    assert chunks(8) == (16,)
