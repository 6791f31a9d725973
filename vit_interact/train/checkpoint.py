"""Checkpoints by orbax: written in the background, whole or not at all, and found again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit_interact.train.config import completed, differences
from vit_interact.train.state import TrainState

FOLDER = "checkpoints"
RECORD = "experiment.json"
_METRIC = "accuracy"
# Of a checkpoint that was not evaluated: worse than any.
_UNKNOWN = -1.0


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics[_METRIC]


class Checkpoints:
    """The checkpoints of a run; see `config.checkpoint`."""

    def __init__(self, workdir: Path, keep_last: int = 2, keep_best: int = 1) -> None:
        """Opens the folder, made if needed.

        Args:
          workdir: folder of the run.
          keep_last: newest checkpoints to keep.
          keep_best: checkpoints of highest validation accuracy to keep beside them.
        """
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep_last)]
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=_accuracy,
                    n=keep_best,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # The policy alone would leave accuracies unwritten, and forget them at a restart.
            best_fn=_accuracy,
            # What a kill left half-written is called so, and goes.
            cleanup_tmp_directories=True,
        )
        self.folder = workdir / FOLDER
        # By itself orbax has each device write its part of every array that all hold. A ViT has
        # hundreds of small ones, and to cut them takes ten times as long as to copy them.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                "record": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, record: Mapping[str, Any], accuracy: float | None) -> None:
        """Begins to write; the next step need not wait.

        Args:
          state: a run between two steps.
          record: JSON that says what run this is.
          accuracy: on validation, if this step was evaluated.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(dict(record))
            ),
            # orbax warns on the terminal of every checkpoint that has none.
            metrics={_METRIC: _UNKNOWN if accuracy is None else accuracy},
            force=True,
        )

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def newest(self) -> str:
        """The newest whole checkpoint, in words."""
        self.wait()
        steps = self.steps()
        return str(self.folder / str(steps[0])) if steps else "none: there was none yet"

    def best_step(self) -> int | None:
        """The step of highest validation accuracy that is kept; the earliest of equals."""
        found = []
        for step in self._manager.all_steps():
            accuracy = _accuracy(self._manager.metrics(step))
            if accuracy != _UNKNOWN:
                found.append((accuracy, -step))
        return -max(found)[1] if found else None

    def record(self, step: int) -> dict[str, Any]:
        """What run a checkpoint is of."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return dict(self._manager.restore(step, args=args)["record"])

    def load(self, step: int, abstract: TrainState) -> TrainState:
        """One checkpoint's state.

        Args:
          step: one of `steps()`.
          abstract: shapes, types and shardings, from `abstract_state`.
        """
        wanted = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=wanted))["state"]

    def resume(
        self, abstract: TrainState, config: Mapping[str, Any], on_change: str
    ) -> TrainState | None:
        """The newest state that can be read, or None when there is no checkpoint.

        Args:
          abstract: shapes, types and shardings, from `abstract_state`.
          config: of this session, as JSON.
          on_change: `error` or `continue` when the checkpoint is of another config.

        Raises:
          ValueError: when the config has changed, or no checkpoint can be read.
        """
        problems = []
        for step in self.steps():
            try:
                before = self.record(step)["config"]
            except Exception as error:  # whatever a damaged file makes a reader raise
                problems.append(self._unreadable(step, error))
                continue
            changed = differences(completed(before), config)
            if changed and on_change == "error":
                raise ValueError(
                    f"{self.folder / str(step)} is of another config: {'; '.join(changed)}. Use "
                    "another --workdir, or --config.on_change=continue"
                )
            try:
                return self.load(step, abstract)
            except Exception as error:
                problems.append(self._unreadable(step, error))
        if problems:
            raise ValueError(
                f"no checkpoint in {self.folder} can be read; use another --workdir. "
                + "; ".join(problems)
            )
        return None

    def _unreadable(self, step: int, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        text = f"checkpoint {self.folder / str(step)} cannot be read ({reason})"
        warnings.warn(f"{text}; trying the one before", stacklevel=3)
        return text

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints newer than the one that the run goes on from: they are damaged."""
        for newer in [known for known in self._manager.all_steps() if known > step]:
            self._manager.delete(newer)

    def wait(self) -> None:
        """Until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the background work."""
        self._manager.close()


def write_record(workdir: Path, record: Mapping[str, Any]) -> None:
    """Leaves `experiment.json` for people to read."""
    unfinished = workdir / f"{RECORD}.unfinished"
    unfinished.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    os.replace(unfinished, workdir / RECORD)
