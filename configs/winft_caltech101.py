r"""ViT against window-free transformer, fine-tuned on Caltech-101 from the same backbone.

ARM is one of vit, free, winft, local, shifted, random; see `with_windows` in configs/common.py.
Slices of 10 and 30 images a class: --config.data.per_class=10.

Command:
  python -m vit_interact.train --config=configs/winft_caltech101.py:ARM --workdir=runs/ARM_10_0 \
    --config.data.source=/data/caltech101 --config.init=/data/vit_s14_backbone.safetensors \
    --config.data.per_class=10 --config.seed=0
Hardware, hours and result: docs/results.md
"""

from ml_collections import ConfigDict

from configs import caltech101, common

ARMS = ("vit", "free", "winft", "local", "shifted", "random")


def get_config(arm: str = "winft") -> ConfigDict:
    """One arm: as the first run of configs/caltech101.py, at 112 pixels."""
    config = common.with_windows(caltech101.get_config("112").unlock(), arm)
    config.data.holdout = 0.1
    # The blocks below are frozen.
    config.winft.layers = tuple(range(6, 12))
    # At the backbone's learning rate windows would still hold the whole grid at the end.
    config.optimizer.window_rate = 20.0
    return config.lock()
