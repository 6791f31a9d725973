r"""Fine-tunes pretrained weights on Stanford Cars.

Command:
  python -m vit_interact.train --config=configs/cars.py --workdir=runs/cars \
    --config.init=hf:OWNER/NAME
Hardware: meant for one GPU or TPU v5e.
Hours: not known. Expected result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.finetune("tfds:cars196")
    # Fine differences are small: more pixels.
    config.model.image_size = (448, 448)
    config.batch_size = 64
    return config.lock()
