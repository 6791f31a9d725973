r"""Fine-tunes pretrained weights on Oxford Flowers-102.

Command:
  python -m vit_interact.train --config=configs/flowers.py --workdir=runs/flowers \
    --config.init=hf:OWNER/NAME
Hardware: meant for one GPU or TPU v5e.
Hours: not known. Expected result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.finetune("tfds:oxford_flowers102")
    # Ten images a class to train on, and as many to choose on.
    config.data.holdout = 0.0
    config.data.val = "validation"
    config.batch_size = 64
    config.epochs = 100.0
    return config.lock()
