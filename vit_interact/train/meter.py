"""What the log says while a run goes: losses, speed, time to go; and when it must stop."""

from __future__ import annotations

import datetime
import functools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_interact.models.vit import ViT
from vit_interact.models.winft import window_layers
from vit_interact.train import speed
from vit_interact.train.alongside import Alongside
from vit_interact.train.log import Log
from vit_interact.train.state import Running


class DivergedError(ValueError):
    """The loss is no number any more."""


class Meter:
    """Reports the running sums one step behind, so that the devices never wait for the log."""

    def __init__(
        self,
        log: Log,
        model: ViT,
        frozen: Any,
        schedule: Any,
        batch_size: int,
        steps: int,
        steps_per_epoch: float,
        devices: int,
        last_good: Callable[[], str],
    ) -> None:
        """Begins.

        Args:
          log: where figures go.
          model: that is trained.
          frozen: tree of which parameters stay.
          schedule: learning rate by step.
          batch_size: of all processes.
          steps: of the whole run.
          steps_per_epoch: may be a fraction.
          devices: how many.
          last_good: names the newest checkpoint.
        """
        self.log, self.steps, self.batch_size = log, steps, batch_size
        self.epoch, self._last_good = steps_per_epoch, last_good
        self.flops = speed.step_flops(model.config, frozen) * batch_size
        self.peak, self.peak_from = speed.peak_flops(devices)
        # All at once: asked step by step, the device would finish its queue first.
        self._rates = np.broadcast_to(np.asarray(schedule(np.arange(steps))), (steps,))
        self._window_layers = window_layers(model)
        self._pending: tuple[int, Running, Alongside | None] | None = None
        self._since: tuple[int, float] | None = None
        self._waited = 0.0

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches, with the time that the loop waits for them counted."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def restart(self, step: int) -> None:
        """What came before `step` (compilation, evaluation) does not count as training time."""
        self._since, self._waited = (step, time.perf_counter()), 0.0

    def note(self, step: int, running: Running, alongside: Alongside | None) -> None:
        """Keeps the sums for the next report."""
        self._pending = step, running, alongside

    def report(self) -> None:
        """Writes what was noted, if anything; waits for that step, not for later ones.

        Raises:
          DivergedError: when the loss is not finite.
        """
        if self._pending is None:
            return
        step, running, alongside = self._pending
        self._pending = None
        sums = jax.device_get(running)
        now = time.perf_counter()
        figures = {
            f"train/{name}": float(sum_.total) / max(float(sum_.count), 1.0)
            for name, sum_ in (
                ("loss", sums.loss), ("accuracy", sums.accuracy), ("grad_norm", sums.grad_norm)
            )
        }  # fmt: skip
        for name, sum_ in sums.windows.items():
            value = np.asarray(sum_.total) / max(float(sum_.count), 1.0)
            if name == "area":
                by_layer = zip(self._window_layers, value, strict=True)
                figures |= {f"windows/area/layer_{i:02d}": float(one) for i, one in by_layer}
                value = value.mean()
            figures[f"windows/{name}"] = float(value)
        figures["train/unread"] = float(sums.unread.total)
        figures["train/rate"] = float(self._rates[step - 1])
        figures["train/epoch"] = step / self.epoch
        if self._since is not None and step > self._since[0]:
            seconds = (now - self._since[1]) / (step - self._since[0])
            figures["speed/images_per_s"] = self.batch_size / seconds
            figures["speed/mfu"] = self.flops / seconds / self.peak
            figures["speed/waiting_for_data"] = min(1.0, self._waited / (now - self._since[1]))
            self._since, self._waited = (step, now), 0.0
        self._say(step, figures)
        self.log.write(step, figures)
        if alongside is not None:
            self._report_interactions(alongside)
        self.check(sums, step)

    def check(self, running: Running, step: int) -> None:
        """Waits for a step.

        Raises:
          DivergedError: when a loss or a gradient since the last line was not finite.
        """
        for what, sum_ in (("loss", running.loss), ("gradient", running.grad_norm)):
            value = float(sum_.total)
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {what} became {value} at or shortly before step {step}; the last good "
                    f"checkpoint is {self._last_good()}"
                )

    def _say(self, step: int, figures: dict[str, float]) -> None:
        text = (
            f"step {step}/{self.steps} (epoch {figures['train/epoch']:.2f})  "
            f"loss {figures['train/loss']:.4f}  top-1 {figures['train/accuracy']:.1%}"
        )
        if "windows/guidance" in figures:
            text += f"  windows {figures['windows/guidance']:.3f} off"
        if "windows/area" in figures:
            text += f"  area {figures['windows/area']:.0%}"
        if "speed/mfu" in figures:
            rate = figures["speed/images_per_s"]
            left = datetime.timedelta(seconds=round((self.steps - step) * self.batch_size / rate))
            text += f"  {rate:.4g} images/s  MFU {figures['speed/mfu']:.1%}  ETA {left}"
        if figures["train/unread"]:
            text += f"  {figures['train/unread']:.0f} images could not be read"
        self.log.say(text)

    def _report_interactions(self, alongside: Alongside) -> None:
        taken = alongside.take()
        if taken is None:
            return
        step, watched = taken
        cost = {"interactions/seconds": alongside.seconds or 0.0}
        self.log.write(step, {**alongside.scalars(watched), **cost})
        self.log.write_histograms(step, alongside.histograms(watched))
        self.log.write_images(step, functools.partial(alongside.pictures, step, watched))


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks between steps."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:
            # Not the main thread, as in some notebooks: then nothing is caught.
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # A second time means at once.
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to save and end after this step; all processes get the same answer."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step)) or self._asked
        return self._asked
