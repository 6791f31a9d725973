r"""A small ViT on CIFAR-10 from random weights: the baseline of the window-free transformer.

The grid is 16x16 patches of 2 pixels. Data: a folder with train/CLASS and test/CLASS, or
--config.data.source=tfds:cifar10. On a CPU: configs/cifar10_cpu.py.

Command:
  python -m vit_interact.train --config=configs/cifar10.py --workdir=runs/cifar10 \
    --config.data.source=DIR
Hardware: meant for one GPU or TPU chip.
Hours: not known. Expected result: not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.base()
    config.batch_size = 256
    config.epochs = 200.0
    config.log_every = 100

    # 5,000 training images to choose on.
    config.data.holdout = 0.1
    config.data.test = "test"
    config.data.cache = "device"
    config.data.side = 32
    config.data.crop = "stretch"
    config.augment.crop = (0.5, 1.0)
    config.augment.rand_augment = 2
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0

    config.model.name = "vit_ti16"
    config.model.image_size = (32, 32)
    config.model.fields.update({"patch_size": (2, 2), "stochastic_depth": 0.1})
    config.model.dtype = "bfloat16"
    config.optimizer.weight_decay = 0.05
    config.schedule.rate = 1e-3
    config.schedule.warmup = 10.0
    config.loss.smoothing = 0.1
    return config.lock()
