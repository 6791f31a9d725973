r"""What matters in a window-free transformer: one thing changed at a time, for two cores.

As configs/winft_cifar10_cpu.py, but 6 epochs, and 5,000 images held out in place of 1,000, so that
a difference of an arm's accuracy is known better. ARM is one of

  vit                              no windows
  winft                            guided by itself: leave_one_out, coverage 0.5, weight 1
  attention, gradient, edge        another indicator guides
  coverage_25, _75, _90            windows to learn hold so many percent of a patch's impact
  free, weight_03, weight_3        guidance weighs 0, 0.3, 3
  layers_low, layers_high          windows in the first or the last three of the six layers
  taught                           guided by the trained `vit` of the same seed

Command for one run, and for all runs and their table:
  python -m vit_interact.train --config=configs/winft_study.py:ARM --workdir=runs/ARM_0 \
    --config.data.source=DIR --config.seed=0
  python tools/compare_windows.py --config configs/winft_study.py --data DIR --out runs/study \
    --jobs 2
Hardware, hours and result: docs/results.md
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, winft_cifar10_cpu

_CHANGES: dict[str, dict[str, Any]] = {
    "attention": {"indicator": "attention"},
    "gradient": {"indicator": "gradient"},
    "edge": {"indicator": "edge"},
    "coverage_25": {"coverage": 0.25},
    "coverage_75": {"coverage": 0.75},
    "coverage_90": {"coverage": 0.9},
    "weight_03": {"weight": (0.3, 0.3)},
    "weight_3": {"weight": (3.0, 3.0)},
    "layers_low": {"layers": (0, 1, 2)},
    "layers_high": {"layers": (3, 4, 5)},
}
ARMS = ("vit", "winft", "free", "taught", *_CHANGES)


def get_config(arm: str = "winft") -> ConfigDict:
    """One arm.

    Raises:
      ValueError: for an arm that is not in `ARMS`.
    """
    common.check_arm(arm, ARMS)
    config = winft_cifar10_cpu.get_config("winft" if arm in _CHANGES else arm).unlock()
    config.winft.update(_CHANGES.get(arm, {}))
    config.epochs = 6.0
    config.data.limit = 0
    config.data.per_class = 900
    return config.lock()
