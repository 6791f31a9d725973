"""Data sets of TensorFlow Datasets, read without TensorFlow."""

import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.prepared import PIXELS, encode, pets, prepare
from vit_interact.data.images import ImageError
from vit_interact.data.preprocess import Preprocess
from vit_interact.data.records import Records
from vit_interact.data.sources import open_examples, read_batches


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_images_labels_and_order(folder):
    pets(folder)
    # The model has the classes in another order, and one more.
    names = ("dog", "bird", "cat")
    examples, left_out = open_examples("tfds:pets", names, 3)
    assert left_out == [] and "tensorflow" not in sys.modules
    assert sorted(e.name for e in examples) == [f"pets/1.0.0/validation/{n}" for n in range(6)]
    grey = np.repeat(PIXELS[5, ..., :1], 3, axis=-1)
    expected = {array.tobytes(): index % 2 for index, array in enumerate((*PIXELS[:5], grey))}
    found = {np.asarray(e.read()).tobytes(): ["cat", "dog"].index(names[e.label]) for e in examples}
    assert found == expected
    front, _ = open_examples("tfds:pets:validation", names, 3, limit=2)
    back, _ = open_examples("tfds:pets:1.0.0:validation", names, 3, skip=2)
    assert [e.name for e in front + back] == [e.name for e in examples]
    assert len(open_examples("tfds:pets:train", None, 2)[0]) == 1
    assert len(open_examples("tfds:pets:validation[:50%]", None, 2)[0]) == 3
    preprocess = Preprocess(size=(12, 16))
    (_, batch), (_, last) = read_batches(examples, preprocess, 4)
    assert batch.pictures.shape == (4, 12, 16, 3) and last.count == 2
    assert batch.labels.tolist() == [e.label for e in examples[:4]]


def test_unreadable_records_are_left_out(folder):
    path = pets(folder, broken=[3])
    examples, left_out = open_examples("tfds:pets", ("cat", "dog"), 2)
    assert len(examples) == 5 and len(left_out) == 1
    assert str(left_out[0]).startswith("pets/1.0.0/validation/")
    assert "cut short" in left_out[0].reason
    next(path.glob("*validation*")).unlink()
    with pytest.raises(ValueError, match=r"none of 6 images can be read.*No such file"):
        open_examples("tfds:pets", ("cat", "dog"), 2)


def test_what_does_not_fit(folder):
    path = pets(folder)
    for data, names, outputs, message in (
        ("tfds:pets", ("cat", "cow"), 2, "does not know, such as 'dog'"),
        ("tfds:pets", None, 3, "2 classes and the model 3 outputs"),
        ("tfds:pets:test", None, 2, "Unknown split 'test'. Should be one of .'train'"),
        ("tfds:", None, 2, r"expected tfds:NAME\[/CONFIG\]"),
        ("tfds:pets:2.0.0", None, 2, f"not prepared in {folder} .*tfds.builder.'pets:2.0.0'"),
        ("tfds:lions", None, 2, "TFDS_DATA_DIR names another .*download_and_prepare"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_examples(data, names, outputs)
        assert "\n" not in str(caught.value)
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "riegeli"}))
    message = f"stored as riegeli.*tfds convert_format --dataset_version_dir={path} "
    with pytest.raises(ValueError, match=message):
        open_examples("tfds:pets", None, 2)


def as_tfrecord(path):
    """Rewrites a data set in TFDS's older format, as TensorFlow would frame it."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for file in path.glob("*.array_record*"):
        records = ArrayRecordDataSource(str(file))
        framed = b"".join(
            struct.pack("<Q", len(record)) + b"head" + record + b"tail"
            for record in (records[i] for i in range(len(records)))
        )
        file.with_name(file.name.replace("array_record", "tfrecord")).write_bytes(framed)
        file.unlink()
    text = (path / "dataset_info.json").read_text().replace("array_record", "tfrecord")
    (path / "dataset_info.json").write_text(text)


def test_tfrecord_files_give_the_same_without_tensorflow(folder):
    path = pets(folder)
    names = ("tfds:pets:validation", "tfds:pets:validation[2:5]")
    before = [[Records(name)[i] for i in range(len(Records(name)))] for name in names]
    assert [len(found) for found in before] == [6, 3]
    as_tfrecord(path)
    assert before == [[Records(name)[i] for i in range(len(Records(name)))] for name in names]
    assert "tensorflow" not in sys.modules
    with pytest.raises(IndexError):
        Records(names[0])[6]
    [file] = path.glob("*validation*")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ImageError, match=r"has 5 whole records, not 6"):
        Records(names[0])[5]
    file.unlink()
    with pytest.raises(ValueError, match="not on a disk of this machine"):
        Records(names[0])


def test_splits_and_labels_that_are_not_clear(folder):
    image = encode(Image.fromarray(PIXELS[0]))
    prepare(folder, {"one": [(image, 0)], "two": [(image, -1)]})
    with pytest.raises(ValueError, match=r"name a split, such as tfds:pets:one; it has one, two"):
        Records("tfds:pets")
    with pytest.raises(ValueError, match=r"pets/1.0.0/two/0 has no label"):
        open_examples("tfds:pets:two", None, 2)
    tfds = pytest.importorskip("tensorflow_datasets")
    breed = tfds.features.ClassLabel(num_classes=2)
    prepare(folder, {"only": [(image, 0)]}, "breeds", breed=breed)
    with pytest.raises(ValueError, match="2 features of kind ClassLabel"):
        Records("tfds:breeds")


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "array_record"])
def test_missing_package(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r'pip install "vit-interact\[tfds\]"'):
        open_examples("tfds:pets", None, 2)
