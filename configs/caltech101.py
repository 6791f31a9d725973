r"""Fine-tunes a ViT-S/14 on Caltech-101 at 224 pixels, the lower half of its blocks frozen.

Command:
  python -m vit_interact.train --config=configs/caltech101.py --workdir=runs/caltech101 \
    --config.data.source=/data/caltech101 --config.init=/data/vit_s14_backbone.safetensors
Hardware, hours and result: docs/results.md
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.base()
    config.batch_size = 32
    config.epochs = 3.0
    config.log_every = 10

    config.data.holdout = 0.1
    config.augment.crop = (0.35, 1.0)

    config.model.name = ""
    config.model.image_size = (224, 224)
    config.optimizer.freeze = r"^(embedding|pos_embedding|cls|Transformer/encoderblock_[0-5]/)"
    config.optimizer.head_rate = 10.0
    config.optimizer.weight_decay = 0.02
    config.schedule.rate = 1e-4
    config.schedule.warmup = 0.2
    config.loss.smoothing = 0.1
    config.ema = 0.99
    return config.lock()
