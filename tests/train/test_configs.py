"""Every experiment, shrunk, two steps on made-up data of the structure that TFDS gives its set."""

import importlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vit_interact as vi
from tests.data.prepared import encode
from tests.train import tiny
from tests.train.test_settings import CONFIGS
from vit_interact.train.train import train

# What TFDS stores beside image and label, as its catalogue says, and the splits.
STRUCTURES = {
    "imagenet2012": (("train", "validation"), ("file_name",)),
    "caltech_birds2011": (
        ("train", "test"), ("bbox", "image/filename", "label_name", "segmentation_mask"),
    ),
    "cars196": (("train", "test"), ("bbox",)),
    "stanford_dogs": (("train", "test"), ("image/filename",)),
    "oxford_flowers102": (("train", "validation", "test"), ("file_name",)),
    "oxford_iiit_pet": (("train", "test"), ("file_name", "species", "segmentation_mask")),
}  # fmt: skip
EACH = 24


def prepare(folder, name):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    splits, extras = STRUCTURES[name]
    kinds = {
        "bbox": tfds.features.BBoxFeature(),
        "species": tfds.features.ClassLabel(names=["cat", "dog"]),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
    }
    values = {
        "bbox": tfds.features.BBox(0.1, 0.2, 0.8, 0.9),
        "species": 1,
        "segmentation_mask": lambda: io.BytesIO(encode(Image.new("L", (20, 20)))),
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=list(tiny.NAMES)),
                **{key: kinds.get(key, tfds.features.Text()) for key in extras},
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=("image", "label")
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            found = tiny.pictures(EACH, side=20)
            for index in range(EACH):
                image, label = found.read(index)
                more = {key: values.get(key, "text") for key in extras}
                more = {key: value() if callable(value) else value for key, value in more.items()}
                yield index, {"image": io.BytesIO(encode(image)), "label": label, **more}

    Builder.name = name
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small trained-looking model of other classes, and one of the same."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for kind, names in (("init", ("x", "y", "z")), ("teacher", tiny.NAMES)):
        model = vi.create_model(
            "vit_ti16", num_classes=len(names), image_size=32, width=32, depth=2, heads=4,
            mlp_dim=64,
        )  # fmt: skip
        params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        found[kind] = str(folder / f"{kind}.safetensors")
        vi.export_timm(model, params, found[kind], class_names=names)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_of_every_config(name, weights, tmp_path, monkeypatch):
    settings = importlib.import_module(f"configs.{name}").get_config()
    source = settings.data.source
    if source.startswith("tfds:"):
        prepare(tmp_path, source.removeprefix("tfds:"))
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    else:
        settings.data.source = str(tiny.save(tmp_path / "data.npz"))
    if settings.model.name:
        settings.model.fields.update({"width": 32, "depth": 2, "heads": 4, "mlp_dim": 64})
    else:
        settings.init = weights["init"]
        settings.optimizer.freeze = settings.optimizer.freeze.replace("[0-5]", "0")
        settings.winft.layers = settings.winft.layers and (1,)
    if name == "imagenet_deit_s16":
        settings.distill.teacher = weights["teacher"]
    settings.model.image_size = (32, 32)
    settings.batch_size, settings.steps, settings.schedule.warmup = 8, 2, 0.0
    settings.data.holdout = 0.3 if settings.data.holdout else 0.0
    settings.data.limit = min(settings.data.limit, 16)
    settings.data.workers = 0
    settings.log_every = 1
    result = train(settings, tmp_path / "run", devices=jax.devices()[:2])
    judged = "val" if settings.data.val or settings.data.holdout else "test"
    assert result["finished"] and np.isfinite(result[judged]["loss"])
    assert ("test" in result) == bool(settings.data.test)
    assert vi.load_checkpoint(tmp_path / "run").class_names == tiny.NAMES
