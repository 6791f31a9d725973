r"""Fine-tunes pretrained weights on FGVC-Aircraft.

TFDS does not have this set: sort the images into DIR/train/VARIANT, DIR/test/VARIANT.

Command:
  python -m vit_interact.train --config=configs/aircraft.py --workdir=runs/aircraft \
    --config.data.source=DIR --config.init=hf:OWNER/NAME
Hardware: meant for one GPU or TPU v5e.
Hours: not known. Expected result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.finetune("")
    config.model.image_size = (448, 448)
    config.batch_size = 64
    return config.lock()
