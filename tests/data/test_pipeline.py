"""What a step sees depends on seed and step alone."""

import numpy as np
import pytest
from PIL import Image

from tests.data.prepared import pets
from vit_interact.data.images import ImageError
from vit_interact.data.labelled import Arrays, Files, Labelled, Part, hold_out, open_split, take_few
from vit_interact.data.pipeline import Kept, Reading, batches, steps_of, stretch

COUNT = 10


def numbered(count=COUNT):
    """Pictures that say their own number."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 48).reshape(count, 4, 4, 3)
    return Arrays(images, np.arange(count) % 3, ("a", "b", "c"))


def whole(image, generator):
    pixels = np.asarray(image).copy()
    pixels[0, 0, 0] = generator.integers(256)
    return pixels


def read(steps, batch=4, source=None, **how):
    found = batches(source or numbered(), whole, (4, 4), batch, steps, **how)
    return [{name: np.array(array) for name, array in one.items()} for one in found]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_each_epoch_holds_every_picture_once_in_an_order_of_its_own():
    stream = np.concatenate([one["indices"] for one in read(range(10))])
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(COUNT))
    assert list(stream[:10]) != list(stream[10:20])
    first = read(range(1))[0]
    np.testing.assert_array_equal(first["pictures"][:, 1, 1, 0], first["indices"])
    np.testing.assert_array_equal(first["labels"], first["indices"] % 3)
    assert list(np.concatenate([one["indices"] for one in read(range(10), seed=1)])) != list(stream)


def test_a_stream_goes_on_at_any_step():
    same(read(range(7))[3:], read(range(3, 7)))


def test_worker_processes_change_nothing():
    same(read(range(6)), read(range(6), reading=Reading(workers=2, threads=1)))


def test_processes_read_parts_of_the_same_batches():
    one = read(range(5))
    two = [read(range(5), process=(p, 2)) for p in range(2)]
    joined = [
        {name: np.concatenate([two[0][i][name], two[1][i][name]]) for name in one[0]}
        for i in range(5)
    ]
    same(one, joined)
    with pytest.raises(ValueError, match="not a multiple of 3 processes"):
        read(range(1), process=(0, 3))


def test_evaluation_counts_every_picture_once_whatever_the_batch():
    for batch in (1, 3, 4, 16):
        for count in (1, 2):
            if batch % count:
                continue
            seen = [
                one["indices"][one["mask"]]
                for p in range(count)
                for one in read(steps_of(COUNT, batch), batch, shuffle=False, process=(p, count))
            ]
            assert sorted(np.concatenate(seen)) == list(range(COUNT))


class Damaged(Arrays):
    def read(self, index):
        if index == 3:
            raise ImageError("photo.jpg", "is damaged")
        return super().read(index)


def damaged():
    plain = numbered()
    return Damaged(plain.images, plain.labels, plain.class_names)


@pytest.mark.parametrize("kept", [False, True])
def test_a_damaged_picture_leaves_its_place_empty_or_stops(kept):
    source = Kept(damaged(), 4) if kept else damaged()
    found = read(range(1), COUNT, source)[0]
    assert found["mask"].sum() == COUNT - 1
    place = list(found["mask"]).index(False)
    assert found["indices"][place] == 3 and not found["pictures"][place].any()
    with pytest.raises(ImageError, match=r"photo\.jpg: is damaged"):
        read(range(1), COUNT, source, reading=Reading(corrupt="error"))


def test_kept_pictures_are_shrunk_and_read_as_before():
    large = Arrays(np.zeros((3, 40, 20, 3), np.uint8) + 9, np.arange(3), "abc")
    kept = Kept(large, 10)
    assert kept.size(0) == (20, 10) and kept.bytes == 3 * 20 * 10 * 3
    assert list(kept.labels) == [0, 1, 2] and isinstance(kept, Labelled)
    assert kept.stretched((8, 8)).shape == (3, 8, 8, 3)
    assert (kept.stretched((8, 8)) == 9).all()
    same(read(range(3)), read(range(3), source=Kept(numbered(), 4)))


def test_pictures_on_the_device_need_no_pixels():
    kept = Kept(numbered(), 4)
    found = [dict(one) for one in batches(kept, None, (4, 4), 4, range(3))]
    for plain, bare in zip(read(range(3)), found, strict=True):
        assert "pictures" not in bare
        np.testing.assert_array_equal(plain["indices"], bare["indices"])
        np.testing.assert_array_equal(plain["labels"], bare["labels"])


def test_stretching():
    image = Image.new("RGB", (30, 20), (1, 2, 3))
    assert stretch(image, (8, 9)).shape == (8, 9, 3)
    assert stretch(image, (20, 30)).shape == (20, 30, 3)


@pytest.fixture
def folders(tmp_path):
    for split, classes in {"train": "abc", "val": "ab"}.items():
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (6, 5), (ord(name), i, 0)).save(folder / f"{i}.png")
    return tmp_path


def test_folders_with_splits(folders):
    train = open_split(folders, "train")
    assert isinstance(train, Files) and train.class_names == ("a", "b", "c") and len(train) == 9
    val = open_split(folders, "val", train.class_names)
    assert list(val.labels) == [0, 0, 0, 1, 1, 1]
    image, label = val.read(5)
    assert label == 1 and image.getpixel((0, 0)) == (ord("b"), 2, 0)
    with pytest.raises(ValueError, match=r"no folder for split 'test'; it has train, val"):
        open_split(folders, "test")
    with pytest.raises(ValueError, match=r"config\.data\.holdout"):
        open_split(folders / "train", "val")
    assert len(open_split(folders / "train", "train")) == 9


def test_a_class_that_only_a_test_split_has_is_named(folders):
    (folders / "val" / "zebra").mkdir()
    Image.new("RGB", (6, 5)).save(folders / "val" / "zebra" / "0.png")
    with pytest.raises(ValueError, match="zebra: this class is not in training"):
        open_split(folders, "val", ("a", "b", "c"))


def test_npz_files(tmp_path):
    source = numbered()
    path = tmp_path / "data.npz"
    names = np.array(["a", "b", "c"])
    np.savez(path, train_images=source.images, train_labels=source.labels, class_names=names)
    found = open_split(path, "train")
    assert found.class_names == ("a", "b", "c") and len(found) == COUNT
    with pytest.raises(ValueError, match="no arrays test_images"):
        open_split(path, "test")
    path.write_text("no zip")
    with pytest.raises(ValueError, match=r"data\.npz is no \.npz file"):
        open_split(path, "train")
    with pytest.raises(ValueError, match=r"nothing\.npz: No such file"):
        open_split(tmp_path / "nothing.npz", "train")
    with pytest.raises(ValueError, match=r"expected uint8 \[n, h, w, 3\]"):
        Arrays(source.images.astype(np.float32), source.labels)
    with pytest.raises(ValueError, match="run from 0 to 2; there are 2"):
        Arrays(source.images, source.labels, ("a", "b"))


def test_prepared_data_sets_and_worker_processes(tmp_path, monkeypatch):
    pets(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = open_split("tfds:pets", "validation")
    assert source.class_names == ("cat", "dog") and len(source) == 6 and source.labels is None

    def all_of(workers):
        reading = Reading(workers=workers, threads=1)
        found = batches(source, shrunk, (4, 4), 2, range(3), reading=reading)
        return [{name: np.array(array) for name, array in one.items()} for one in found]

    same(all_of(0), all_of(2))


def shrunk(image, generator):
    return stretch(image, (4, 4))


def test_holding_out_takes_its_share_of_every_class():
    source = numbered(90)
    stays, held = hold_out(source, 0.1, 0)
    assert isinstance(held, Part) and len(stays) == 81
    assert sorted(np.concatenate([stays.indices, held.indices])) == list(range(90))
    assert np.bincount(held.labels).tolist() == [3, 3, 3]
    assert list(hold_out(source, 0.1, 0)[1].indices) == list(held.indices)
    assert list(hold_out(source, 0.1, 1)[1].indices) != list(held.indices)
    with pytest.raises(ValueError, match="leaves one part empty"):
        hold_out(source, 0.001, 0)


def test_a_few_of_every_class():
    labels = np.array([0] * 5 + [1] * 2 + [2] * 9, np.int32)
    source = Arrays(np.zeros((16, 4, 4, 3), np.uint8), labels, ("a", "b", "c"))
    few = take_few(source, 3, 0)
    assert np.bincount(labels[few.indices]).tolist() == [3, 2, 3]
    assert list(take_few(source, 3, 0).indices) == list(few.indices)
    assert list(take_few(source, 3, 1).indices) != list(few.indices)
