r"""Window-free transformer against its controls on 10,000 images of CIFAR-10, for two cores.

All but the windows is as in configs/cifar10_cpu.py. ARM is one of vit, local, shifted, random,
offset, teacher, free, winft, taught; see `with_windows` in configs/common.py.

Command for one run, and for all runs and their table:
  python -m vit_interact.train --config=configs/winft_cifar10_cpu.py:ARM --workdir=runs/ARM_0 \
    --config.data.source=DIR --config.seed=0
  python tools/compare_windows.py --data DIR --out runs
Hardware, hours and result so far: docs/results.md
"""

from ml_collections import ConfigDict

from configs import cifar10_cpu, common

ARMS = common.ARMS


def get_config(arm: str = "winft") -> ConfigDict:
    """One arm."""
    config = cifar10_cpu.get_config().unlock()
    return common.with_windows(config, arm).lock()
