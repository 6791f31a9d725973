r"""Fine-tunes pretrained weights on Oxford-IIIT Pet.

Command:
  python -m vit_interact.train --config=configs/pets.py --workdir=runs/pets \
    --config.init=hf:OWNER/NAME
Hardware: meant for one GPU or TPU v5e.
Hours: not known. Expected result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.finetune("tfds:oxford_iiit_pet")
    return config.lock()
