r"""Trains a Vision Transformer.

Examples:
  python -m vit_interact.train --config=configs/caltech101.py --workdir=/tmp/run \
      --config.data.source=/data/caltech101
  python -m vit_interact.train --config=configs/folder.py --workdir=/tmp/run \
      --config.data.source=/my/photos --config.batch_size=64 --config.model.dtype=bfloat16

Run the same command again to go on where it stopped. Ctrl-C saves and ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from vit_interact.heap import keep_freed_memory
from vit_interact.processes import leave_interrupted
from vit_interact.train import config as defaults

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; --config.NAME=VALUE changes a setting."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, figures and weights.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    os.environ.get("VIT_INTERACT_DISTRIBUTED") == "1",
    "Several hosts that find each other (Cloud TPU pod slice, SLURM, MPI); also by "
    "VIT_INTERACT_DISTRIBUTED=1.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where hosts do not find each other."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, with --coordinator.")


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}")
    from absl import logging

    # What absl tells of backends that are not there would bury our own lines.
    logging.set_verbosity(logging.WARNING)
    import jax

    from vit_interact.cli.shell import watched
    from vit_interact.train.train import train

    keep_freed_memory()
    if _DISTRIBUTED.value or _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    assert _WORKDIR.value is not None
    try:
        train(_CONFIG.value, _WORKDIR.value, watch=watched("decoding"))
    except (ValueError, OSError) as error:
        _fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail("too little memory; docs/launch.md says what to do, in which order")


def _parse(argv: Sequence[str]) -> list[str]:
    """Flags, with a line of our own for settings that do not exist or have another type."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # Without flags absl shows how the command is used, which is right.
        print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        _fail(f"no setting is called '{name}'; all are in {defaults.__file__}")
    except (TypeError, ValueError, OSError) as error:
        _fail(error)
    raise SystemExit(1)


def _fail(message: object) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """Runs the command line."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        app.run(_main, flags_parser=_parse)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is kept: run it again to go on", file=sys.stderr)
        leave_interrupted()


if __name__ == "__main__":
    main()
