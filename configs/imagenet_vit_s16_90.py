"""ViT-S/16 on ImageNet-1k, 90 epochs.

Command:
  python -m vit_interact.train --config=configs/imagenet_vit_s16_90.py --workdir=runs/vit_s16_90
Hardware: meant for 8 H100 or a v5e-16 slice.
Hours: not known. Expected result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.imagenet("vit_s16", epochs=90)
    # A shorter run needs less noise.
    config.augment.erase = 0.0
    config.model.fields.stochastic_depth = 0.0
    return config.lock()
