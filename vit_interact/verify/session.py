"""`vit-interact verify`: from a checkpoint and labelled images to a folder of results."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_interact.data.images import ImageError
from vit_interact.data.sources import Example
from vit_interact.models.weights import Checkpoint
from vit_interact.verify import run, timing
from vit_interact.verify.parts import Parts, replace_text
from vit_interact.verify.results import collect, to_csv
from vit_interact.verify.subject import Subject


class Verification:
    """One verification on disk; `estimate` says what it costs before `run` does it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        examples: Sequence[Example],
        plan: run.Plan,
        out: Path,
        skip: int = 0,
        left_out: Sequence[ImageError] = (),
    ) -> None:
        """Opens the folder; the model is compiled later.

        Args:
          checkpoint: from `load_checkpoint`.
          examples: the first of what `open_examples` returns.
          plan: what to verify.
          out: the folder; finished parts in it are kept.
          skip: place of the first example in the whole order.
          left_out: images that could not be read, for the record.

        Raises:
          ValueError: when the folder holds something else, or the model has no classes.
        """
        self.checkpoint, self.examples, self.plan, self.out = checkpoint, examples, plan, out
        self.skip, self.left_out = skip, left_out
        self.subject = Subject.of(checkpoint.model)
        self.options = {
            **dataclasses.asdict(plan),
            "model": checkpoint.source,
            "weights_sha256": checkpoint.sha256,
        }
        # Before the folder: what cannot run leaves nothing behind.
        self.programs = run.Programs(
            self.subject, checkpoint.params, checkpoint.preprocess, plan, model=checkpoint.model
        )
        self.parts = Parts(out, self.options, _tags(examples, plan.batch_size, skip))

    @property
    def passes(self) -> float:
        """Forward passes of one image in all, finished ones included."""
        plan = self.plan
        return sum(plan.passes(*part, self.subject) for part in plan.parts())

    def estimate(self) -> tuple[float, float]:
        """Seconds of one forward pass of an image, and seconds of all that is left to do."""
        plan = self.plan
        batch = timing.read_first(self.examples, self.checkpoint.preprocess, plan)
        one = timing.measure_pass(self.programs, batch)
        batches = range(-(-len(self.examples) // plan.batch_size))
        left = sum(
            plan.passes(*part, self.subject)
            for number in batches
            for part in plan.parts()
            if not self.parts.has(*part, number)
        )
        return one, one * left * plan.batch_size

    def run(self, advance: Callable[[float], None] = lambda passes: None) -> dict[str, Any]:
        """Runs what is left and writes `verify.json`, `verify.csv` and pictures.

        Args:
          advance: called with forward passes of a batch when they are finished.

        Returns:
          The content of `verify.json`.
        """
        run.run_parts(
            self.programs, self.parts, self.examples, self.checkpoint.preprocess, self.skip, advance
        )
        found = collect(self.parts, self.plan, self.subject, self.checkpoint.model.config)
        device = jax.devices()[0]
        report = {
            "options": {**self.options, "skip": self.skip, "images": len(self.examples)},
            "images_sha256": _digest(self.examples),
            "left_out": [{"image": str(e.path), "reason": e.reason} for e in self.left_out],
            "architecture": self.checkpoint.model.config.to_dict(),
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("vit-interact", "jax", "flax", "numpy")
            },
            "device": {"kind": device.device_kind, "count": jax.local_device_count()},
            **found,
        }
        plan = self.plan
        first = timing.read_first(self.examples, self.checkpoint.preprocess, plan)
        if "windows" in plan.tests:
            report["windows_speed"] = timing.time_windows(self.programs, first)
        if "removal" in plan.tests and "drop" in plan.interventions:
            report["drop_speed"] = timing.time_drop(self.programs, first, plan.shares[-1])
        from vit_interact.viz.verification import draw_verification

        replace_text(self.out / "verify.json", json.dumps(report, indent=1))
        replace_text(self.out / "verify.csv", to_csv(found))
        draw_verification(report, self.out)
        return report


def _tags(examples: Sequence[Example], batch_size: int, skip: int) -> list[str]:
    """What each batch holds; random controls depend on the place in the whole order, too."""
    starts = range(0, len(examples), batch_size)
    return [f"{skip + s}-{_digest(examples[s : s + batch_size])[:10]}" for s in starts]


def _digest(examples: Sequence[Example]) -> str:
    """Hash of names and sizes of encoded images."""
    lines = (f"{example.name} {example.size}\n" for example in examples)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
