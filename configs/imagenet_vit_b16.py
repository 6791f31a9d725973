"""ViT-B/16 on ImageNet-1k, 300 epochs.

Command:
  python -m vit_interact.train --config=configs/imagenet_vit_b16.py --workdir=runs/vit_b16
Hardware: meant for 8 H100 or a v5e-32 slice.
Hours: not known. Expected result: not run by us
(DeiT-B in the literature, by a similar recipe: 81.8 %).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.imagenet("vit_b16", epochs=300)
    config.ema = 0.9999
    return config.lock()
