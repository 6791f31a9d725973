"""What experiments share. A config starts from all defaults and names what it changes.

Every setting stands in vit_interact/train/config.py with what it means. Any of them can be changed
on the command line, for example --config.batch_size=64 --config.optimizer.accumulate=4.
"""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from vit_interact.train.config import default_config

#: Arms of the comparison of windows (docs/results.md); `with_windows` says what they are.
ARMS = ("vit", "local", "shifted", "random", "offset", "teacher", "free", "winft", "taught")


def base() -> ConfigDict:
    """All settings."""
    return default_config()


def imagenet(name: str, epochs: int) -> ConfigDict:
    """ImageNet-1k from random weights, by the recipe of DeiT (Touvron et al. 2021).

    One hundredth of the training images is held out to choose on; the validation split, which
    the literature reports, is read once.
    """
    config = base()
    config.data.source = "tfds:imagenet2012"
    config.data.holdout = 0.01
    config.data.test = "validation"
    config.data.crop_pct = 0.875
    config.data.interpolation = "bicubic"
    config.model.name = name
    config.model.dtype = "bfloat16"
    config.model.fields.update({"stochastic_depth": 0.1})
    config.batch_size = 1024
    config.epochs = float(epochs)
    config.log_every = 100
    config.augment.rand_augment = 2
    config.augment.erase = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optimizer.weight_decay = 0.05
    config.schedule.rate = 1e-3
    config.schedule.warmup = 5.0
    config.schedule.final = 1e-5
    config.loss.smoothing = 0.1
    return config


def finetune(source: str, train: str = "train", test: str = "test") -> ConfigDict:
    """Fine-tuning of pretrained weights (config.init) on a small set of fine classes."""
    config = base()
    config.data.source = source
    config.data.train, config.data.test = train, test
    config.data.holdout = 0.1
    config.model.name = ""
    config.model.dtype = "bfloat16"
    config.model.fields.update({"stochastic_depth": 0.1})
    config.batch_size = 128
    config.epochs = 40.0
    config.log_every = 20
    config.augment.crop = (0.25, 1.0)
    config.optimizer.layer_decay = 0.75
    config.optimizer.head_rate = 10.0
    config.schedule.rate = 2e-4
    config.schedule.warmup = 4.0
    config.loss.smoothing = 0.1
    config.ema = 0.999
    return config


def with_windows(config: ConfigDict, arm: str) -> ConfigDict:
    """An arm of the comparison of windows; all else stays as it is.

    Args:
      config: of the plain ViT.
      arm: `vit`; `local`, `shifted` or `random` windows of 5x5 patches; `offset` windows of a
        survey of a trained ViT (config.winft.file); `teacher`, windows that it draws for each image
        (config.winft.teacher); `free`, predicted ones without guidance; `winft`, guided by the
        model itself; `taught`, guided by config.winft.teacher.

    Raises:
      ValueError: for another arm.
    """
    check_arm(arm, ARMS)
    kinds = {"vit": "", "free": "predicted", "winft": "predicted", "taught": "predicted"}
    config.winft.windows = kinds.get(arm, arm)
    config.winft.guide = {"winft": "self", "taught": "teacher"}.get(arm, "")
    config.winft.coverage = 0.5
    config.winft.sharpness = (1.0, 0.3)
    return config


def check_arm(arm: str, arms: Sequence[str]) -> None:
    """Raises ValueError, naming the known ones, unless `arm` is one of `arms`."""
    if arm not in arms:
        raise ValueError(f"arm '{arm}': expected one of {', '.join(arms)}")
