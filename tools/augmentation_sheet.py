"""Draws docs/images/augmentation.jpg: every transform on embedded photographs.

python tools/augmentation_sheet.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vit_interact.data.augment import Augment, augment_images, erase_images, mix_images
from vit_interact.data.augment_host import augment_picture
from vit_interact.data.pipeline import stretch
from vit_interact.data.samples import sample_images

OUT = Path(__file__).parents[1] / "docs" / "images" / "augmentation.jpg"
PLAIN = {"crop": None, "flip": False}
ROWS = {
    "crop, flip": Augment(crop=(0.2, 1.0)),
    "RandAugment": Augment(**PLAIN, rand_augment=2),
    "colour jitter": Augment(**PLAIN, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "erasing": Augment(**PLAIN, erase=1.0),
    "mixup": Augment(**PLAIN, mixup=1.0),
    "cutmix": Augment(**PLAIN, cutmix=1.0),
}
SIDE, COUNT = 96, 8


def main() -> None:
    """Draws the sheet."""
    photographs = [Image.open(one.path).convert("RGB") for one in sample_images(COUNT)]
    pictures = jnp.asarray(np.stack([stretch(one, (112, 112)) for one in photographs]))
    sizes = jnp.array([[one.height, one.width] for one in photographs])
    rows = {"as it is": [stretch(one, (SIDE, SIDE)) for one in photographs]}
    for number, (name, plan) in enumerate(ROWS.items()):
        keys = jax.random.split(jax.random.key(number + 2), 3)
        device = augment_images(keys[0], pictures, sizes, plan, (SIDE, SIDE))
        device = erase_images(keys[1], device / 127.5 - 1, plan)
        device, _ = mix_images(keys[2], device, jnp.eye(COUNT), plan)
        rows[f"{name}, device"] = np.clip((np.asarray(device) + 1) * 127.5, 0, 255).astype(np.uint8)
        if number < 3:
            rows[f"{name}, host"] = [
                augment_picture(np.random.default_rng([number, i]), one, plan, (SIDE, SIDE))
                for i, one in enumerate(photographs)
            ]
    figure = Figure(figsize=(1.15 * COUNT + 1.7, 1.15 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), COUNT)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
    figure.savefig(OUT, dpi=70, pil_kwargs={"quality": 82})


if __name__ == "__main__":
    main()
