r"""Fine-tunes pretrained weights on a folder of your own, one folder in it for each class.

With DIR/train, DIR/val and DIR/test (each of class folders) set --config.data.holdout=0.0
--config.data.val=val --config.data.test=test; otherwise a tenth is held out to choose on.

Command:
  python -m vit_interact.train --config=configs/folder.py --workdir=runs/mine \
    --config.data.source=DIR --config.init=WEIGHTS
Hardware: anything; on a CPU set --config.model.dtype=float32 and freeze most blocks.
Hours: depends. Expected result: depends.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.finetune("", test="")
    config.batch_size = 64
    config.epochs = 20.0
    return config.lock()
