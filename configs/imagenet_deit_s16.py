r"""DeiT-S/16 on ImageNet-1k, 300 epochs, learning from a teacher as well.

Command:
  python -m vit_interact.train --config=configs/imagenet_deit_s16.py --workdir=runs/deit_s16 \
    --config.distill.teacher=TEACHER.safetensors
Hardware: meant for 8 H100 or a v5e-16 slice.
Hours: not known. Expected result: not run by us (in the literature 81.2 %, with RegNetY-16GF as
teacher and a head of its own for it).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.imagenet("deit_s16", epochs=300)
    config.distill.kind = "hard"
    config.distill.weight = 0.5
    return config.lock()
