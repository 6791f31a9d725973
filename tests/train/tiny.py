"""A run that takes seconds: a small model, and pictures whose class is their colour."""

import numpy as np

from vit_interact.data.labelled import Arrays
from vit_interact.train.config import default_config

NAMES = ("red", "green", "blue", "grey")
FIELDS = {"width": 32, "depth": 2, "heads": 8, "mlp_dim": 64, "patch_size": (4, 4)}


def pictures(count=64, side=16, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(NAMES)
    images = generator.integers(0, 160, (count, side, side, 3))
    images[np.arange(count), :, :, labels % 3] += np.where(labels < 3, 80, 0)[:, None, None]
    return Arrays(images.astype(np.uint8), labels.astype(np.int32), NAMES)


def data():
    return {"train": pictures(), "val": pictures(20, seed=1), "test": pictures(12, seed=2)}


def config(**changes):
    """A small run; changes are paths with double underscores, as `optimizer__name="sgd"`."""
    found = default_config()
    found.batch_size = 16
    found.steps = 6
    found.log_every = 1
    found.tensorboard = False
    found.data.val = "val"
    found.data.workers = 0
    found.augment.crop = (0.6, 1.0)
    found.model.name = "vit_ti16"
    found.model.image_size = (16, 16)
    found.model.fields.update(FIELDS)
    found.schedule.rate = 3e-3
    found.eval.every = 1000
    found.checkpoint.every = 1000
    for path, value in changes.items():
        *folders, name = path.split("__")
        place = found
        for folder in folders:
            place = place[folder]
        if isinstance(value, dict):
            with place[name].unlocked():
                place[name].update(value)
        else:
            place[name] = value
    return found


def get_config():
    """For the command line, where `save` has written the data."""
    return config()


def save(path):
    """The data as a `.npz` file."""
    arrays = {"class_names": np.array(NAMES)}
    for split, found in data().items():
        arrays |= {f"{split}_images": found.images, f"{split}_labels": found.labels}
    np.savez(path, **arrays)
    return path
