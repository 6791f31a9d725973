r"""Window-free transformer against its controls on CIFAR-10, a grid of 16x16, for an accelerator.

ARM is one of vit, local, shifted, random, offset, teacher, free, winft, taught; see `with_windows`
in configs/common.py. All but the windows is as in configs/cifar10.py.

Command for one run, and for all runs and their table:
  python -m vit_interact.train --config=configs/winft_cifar10.py:ARM --workdir=runs/ARM_0 \
    --config.data.source=DIR --config.seed=0
  python tools/compare_windows.py --config configs/winft_cifar10.py --data DIR --out runs
Hardware and hours: one GPU or TPU. Result: not run by us.
"""

from ml_collections import ConfigDict

from configs import cifar10, common

ARMS = common.ARMS


def get_config(arm: str = "winft") -> ConfigDict:
    """One arm."""
    config = common.with_windows(cifar10.get_config().unlock(), arm)
    config.winft.size = (9, 9)
    return config.lock()
