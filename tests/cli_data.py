"""Small images, and weights that look at them, for tests of the commands."""

import numpy as np
from PIL import Image

import vit_interact as vi
from tests.models.helpers import tiny
from vit_interact.data.preprocess import Preprocess

CLASSES = ("ant", "bee", "cat", "dog", "<b>elk</b>")


def tiny_weights(folder):
    """A tiny model of 3x4 patches as a file with classes and preprocessing."""
    model, params, _ = tiny()
    path = folder / "tiny.safetensors"
    preprocess = Preprocess(size=(12, 16), crop="stretch")
    vi.export_timm(model, params, path, preprocess=preprocess, class_names=CLASSES)
    return path


def photographs(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        pixels = rng.integers(0, 255, (20 + index, 31, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder
