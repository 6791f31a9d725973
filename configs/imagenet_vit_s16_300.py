"""ViT-S/16 on ImageNet-1k, 300 epochs.

Command:
  python -m vit_interact.train --config=configs/imagenet_vit_s16_300.py --workdir=runs/vit_s16_300
Hardware: meant for 8 H100 or a v5e-16 slice.
Hours: not known. Expected result: not run by us
(DeiT-S in the literature, by a similar recipe: 79.8 %).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.imagenet("vit_s16", epochs=300)
    return config.lock()
