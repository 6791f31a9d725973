"""Labelled images: their order, batches, and data that does not fit the model."""

import numpy as np
import pytest

import vit_interact as vi
from tests.data.photographs import photographs
from vit_interact.data.sources import open_examples, read_batches


def test_stretches_of_the_order_do_not_overlap(tmp_path):
    root = photographs(tmp_path / "data")
    names = ("bird", "cat", "dog")
    whole = [e.name for e in open_examples(root, names, 3)]
    assert sorted(whole) == [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(4)]
    front = [e.name for e in open_examples(root, names, 3, limit=3)]
    back = [e.name for e in open_examples(root, names, 3, skip=3)]
    assert front + back == whole
    assert {e.label for e in open_examples(root, names, 3)} == {1, 2}


def test_last_batch_is_padded(tmp_path):
    examples = open_examples(photographs(tmp_path / "data", each=3), ("cat", "dog"), 2)
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
    with pytest.raises(ValueError, match="expected 'embedded' or a folder"):
        open_examples(tmp_path / "missing", None, 3)
