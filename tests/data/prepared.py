"""A real small TFDS data set on disk, made without TensorFlow."""

import io

import numpy as np
import pytest
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 20, 24, 3), dtype=np.uint8)


def encode(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def prepare(folder, splits, name="pets", **features):
    """Splits are lists of (encoded image, label); returns the folder of the data set."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                **features,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, manager):
            return {split: self._generate_examples(found) for split, found in splits.items()}

        def _generate_examples(self, found):
            for index, (image, label) in enumerate(found):
                values = {"image": io.BytesIO(image), "label": label}
                yield index, {**values, **{key: label for key in features}}

    Builder.name = name
    builder = Builder(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder / name / "1.0.0"


def pets(folder, broken=()):
    images = [encode(Image.fromarray(one)) for one in PIXELS]
    # One channel, as in MNIST.
    images[5] = encode(Image.fromarray(PIXELS[5, ..., 0]))
    for index in broken:
        images[index] = images[index][:200]
    found = [(image, index % 2) for index, image in enumerate(images)]
    return prepare(folder, {"train": found[:1], "validation": found})
