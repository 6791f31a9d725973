r"""Window-free transformer against its controls on CIFAR-10, a grid of 16x16, for an accelerator.

ARM is one of vit, local, shifted, random, offset, teacher, free, winft, taught; see `with_windows`
in configs/common.py. 5,000 training images are held out to choose on.

Command for one run, and for all runs and their table:
  python -m vit_interact.train --config=configs/winft_cifar10.py:ARM --workdir=runs/ARM_0 \
    --config.data.source=DIR --config.seed=0
  python tools/compare_windows.py --config configs/winft_cifar10.py --data DIR --out runs
Hardware and hours: one GPU or TPU. Result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arm: str = "winft") -> ConfigDict:
    """One arm."""
    config = common.base()
    config.batch_size = 512
    config.epochs = 100.0
    config.log_every = 50

    config.data.holdout = 0.1
    config.data.test = "test"
    config.data.cache = "device"
    config.data.side = 32
    config.data.crop = "stretch"
    config.augment.crop = (0.5, 1.0)
    config.augment.rand_augment = 2

    config.model.name = "vit_ti16"
    config.model.image_size = (32, 32)
    config.model.dtype = "bfloat16"
    config.model.fields.update({"patch_size": (2, 2), "depth": 9, "stochastic_depth": 0.1})
    config.schedule.rate = 1e-3
    config.schedule.warmup = 5.0
    config.schedule.final = 1e-5
    config.optimizer.weight_decay = 0.05
    config.loss.smoothing = 0.1
    common.with_windows(config, arm)
    config.winft.size = (9, 9)
    return config.lock()
