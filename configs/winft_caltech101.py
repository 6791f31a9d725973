r"""ViT against window-free transformer, fine-tuned on Caltech-101 from the same backbone.

ARM is one of vit, free, winft, local, shifted, random; see `with_windows` in configs/common.py.
Others change one thing of winft:

  detached      guidance changes the windows' heads alone, not the backbone
  weight_03     guidance weighs 0.3 in place of 1
  coverage_90   windows to learn hold 90 % of a patch's impact in place of 50 %
  layers_high   windows in layers 9 to 11 in place of 6 to 11

Command for one run on ten images a class, and for three seeds of several arms and their table:
  python -m vit_interact.train --config=configs/winft_caltech101.py:ARM --workdir=runs/ARM_0 \
    --config.data.source=DIR --config.init=vit_s14_backbone.safetensors \
    --config.data.per_class=10 --config.seed=0
  python tools/compare_windows.py --config configs/winft_caltech101.py --data DIR --out runs/slice \
    --arms vit,winft --jobs 2 init=vit_s14_backbone.safetensors data.per_class=10
Hardware, hours and result: docs/results.md
"""

from typing import Any

from ml_collections import ConfigDict

from configs import caltech101, common

_CHANGES: dict[str, dict[str, Any]] = {
    "detached": {"detach": True},
    "weight_03": {"weight": (0.3, 0.3)},
    "coverage_90": {"coverage": 0.9},
    "layers_high": {"layers": (9, 10, 11)},
}
ARMS = ("vit", "free", "winft", "local", "shifted", "random", *_CHANGES)


def get_config(arm: str = "winft") -> ConfigDict:
    """One arm: as the first run of configs/caltech101.py, at 112 pixels.

    Raises:
      ValueError: for an arm that is not in `ARMS`.
    """
    common.check_arm(arm, ARMS)
    config = caltech101.get_config("112").unlock()
    config = common.with_windows(config, "winft" if arm in _CHANGES else arm)
    config.data.holdout = 0.1
    config.data.test = "test"
    # The blocks below are frozen.
    config.winft.layers = tuple(range(6, 12))
    # At the backbone's learning rate windows would still hold the whole grid at the end.
    config.optimizer.window_rate = 20.0
    config.winft.update(_CHANGES.get(arm, {}))
    return config.lock()
