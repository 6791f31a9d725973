"""Labelled images: their order, batches, and data that does not fit the model."""

import numpy as np
import pytest

import vit_interact as vi
from tests.data.photographs import photographs
from vit_interact.data.images import ImageError
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.sources import open_examples, read_batches


def test_stretches_of_the_order_do_not_overlap(tmp_path):
    root = photographs(tmp_path / "data")
    names = ("bird", "cat", "dog")
    whole = [e.name for e in open_examples(root, names, 3)[0]]
    assert sorted(whole) == [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(4)]
    front = [e.name for e in open_examples(root, names, 3, limit=3)[0]]
    back = [e.name for e in open_examples(root, names, 3, skip=3)[0]]
    assert front + back == whole
    assert {e.label for e in open_examples(root, names, 3)[0]} == {1, 2}


def test_last_batch_is_padded(tmp_path):
    examples, _ = open_examples(photographs(tmp_path / "data", each=3), ("cat", "dog"), 2)
    preprocess = vi.load_checkpoint("vit_s14_caltech101").preprocess
    batches = dict(read_batches(examples, preprocess, 4, first_key=10))
    assert [b.count for b in batches.values()] == [4, 2]
    assert batches[1].keys.tolist() == [14, 15, 16, 17]
    assert batches[1].pictures.shape == (4, 224, 224, 3)
    only = dict(read_batches(examples, preprocess, 4, only=[1]))
    np.testing.assert_array_equal(only[1].pictures, batches[1].pictures)


def test_bad_data(tmp_path):
    root = photographs(tmp_path / "data")
    with pytest.raises(ValueError, match="has 8 images; cannot skip 0 and take 9"):
        open_examples(root, ("cat", "dog"), 2, limit=9)
    with pytest.raises(ValueError, match="does not know, such as 'dog'"):
        open_examples(root, ("cat", "cow"), 2)
    with pytest.raises(ValueError, match="2 classes and the model 3 outputs"):
        open_examples(root, None, 3)
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is an empty class"):
        open_examples(root, ("cat", "dog"), 2)
    with pytest.raises(ValueError, match="expected 'embedded', tfds:NAME or a folder"):
        open_examples(tmp_path / "missing", None, 3)


def test_unreadable_files_are_left_out_and_keep_their_place(tmp_path):
    root = photographs(tmp_path / "data")
    whole, _ = open_examples(root, ("cat", "dog"), 2)
    cut, text = (root / whole[place].name for place in (1, 5))
    cut.write_bytes(cut.read_bytes()[:200])  # its header is whole
    text.write_text("not an image")
    examples, left_out = open_examples(root, ("cat", "dog"), 2)
    assert [e.name for e in examples] == [whole[place].name for place in (0, 2, 3, 4, 6, 7)]
    assert [error.path for error in left_out] == [cut, text]
    front, missing = open_examples(root, ("cat", "dog"), 2, limit=3)
    back, _ = open_examples(root, ("cat", "dog"), 2, skip=3)
    assert [e.name for e in front + back] == [e.name for e in examples]
    assert len(front) == 2 and len(missing) == 1
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first is .*cut short"):
        open_examples(root, ("cat", "dog"), 2, skip=1, limit=1)


def test_a_file_that_breaks_later_stops_with_its_name(tmp_path):
    root = photographs(tmp_path / "data")
    examples, _ = open_examples(root, ("cat", "dog"), 2)
    (root / examples[5].name).write_bytes(b"")
    batches = read_batches(examples, Preprocess(size=(12, 16)), 4)
    assert next(batches)[1].count == 4
    with pytest.raises(ImageError, match=f"{examples[5].name}: is empty"):
        next(batches)


def test_labels_do_not_matter_when_there_are_no_outputs(tmp_path):
    root = photographs(tmp_path, each=2)
    (root / "cat" / "0.png").rename(root / "flat.png")
    seen = []

    def watch(opened, total):
        seen.append(total)
        yield from opened

    examples, left_out = open_examples(root, None, None, watch=watch)
    assert {one.name for one in examples} == {
        "./flat.png", "cat/1.png", "dog/0.png", "dog/1.png",
    }  # fmt: skip
    assert {one.label for one in examples} == {0} and not left_out and seen == [4]
    with pytest.raises(ValueError, match="or a folder of images"):
        open_examples(root / "flat.png", None, None)
