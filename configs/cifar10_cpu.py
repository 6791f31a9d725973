r"""A small ViT on 10,000 images of CIFAR-10, for two cores.

The grid is 8x8 patches of 4 pixels; width 128, 6 layers.

Command:
  python -m vit_interact.train --config=configs/cifar10_cpu.py --workdir=runs/cifar10_cpu \
    --config.data.source=DIR
Hardware, hours and result: docs/results.md
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.base()
    config.batch_size = 128
    config.epochs = 15.0
    config.log_every = 20

    config.data.holdout = 0.1
    config.data.limit = 10_000
    config.data.test = "test"
    config.data.cache = "memory"
    config.data.side = 32
    config.data.crop = "stretch"
    config.augment.crop = (0.5, 1.0)

    config.model.name = "vit_ti16"
    config.model.image_size = (32, 32)
    config.model.fields.update(
        {"patch_size": (4, 4), "width": 128, "depth": 6, "heads": 4, "mlp_dim": 512}
    )
    config.schedule.rate = 1e-3
    config.schedule.warmup = 2.0
    config.optimizer.weight_decay = 0.05
    config.loss.smoothing = 0.1
    return config.lock()
