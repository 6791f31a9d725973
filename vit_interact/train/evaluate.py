"""Accuracy, loss, calibration and confusion over a split, every photograph counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Bool, Float, Int

BINS = 15
"""Bins of confidence for the calibration error (Guo et al. 2017)."""


@flax.struct.dataclass
class Evaluation(metrics.Metric):
    """Sums over photographs, float32; `compute` makes figures of them. A pytree.

    Attributes:
      loss: sum of cross-entropies.
      top5: photographs whose class is among the five highest logits.
      confusion: photographs by class (rows) and prediction (columns), `[classes, classes]`.
      confidence: sum of the highest probability by bin of it, `[BINS]`.
      right: correct predictions by the same bins, `[BINS]`.
      binned: photographs by the same bins, `[BINS]`.
    """

    loss: Any
    top5: Any
    confusion: Any
    confidence: Any
    right: Any
    binned: Any

    @classmethod
    def of(
        cls,
        logits: Float[Array, "B classes"],
        labels: Int[Array, " B"],
        mask: Bool[Array, " B"],
    ) -> Evaluation:
        """Sums of one batch; traceable.

        Args:
          logits: float32.
          labels: class numbers.
          mask: False for places that do not count.
        """
        classes = logits.shape[-1]
        weight = mask.astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        best = jnp.argmax(logits, axis=-1)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        # Of equal logits the lower class number comes first, as argmax has it.
        above = (logits > own) | ((logits == own) & (jnp.arange(classes) < labels[:, None]))
        loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
        sure = jnp.exp(jnp.max(log_p, axis=-1))
        place = jnp.clip(jnp.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
        bins = jax.nn.one_hot(place, BINS) * weight[:, None]
        seen = jax.nn.one_hot(labels, classes) * weight[:, None]
        return cls(
            loss=jnp.sum(loss * weight),
            top5=jnp.sum((jnp.sum(above, axis=-1) < 5) * weight),
            confusion=jnp.einsum(
                "bi,bj->ij", seen, jax.nn.one_hot(best, classes), precision="highest"
            ),
            confidence=sure @ bins,
            right=(best == labels).astype(jnp.float32) @ bins,
            binned=jnp.sum(bins, axis=0),
        )

    def merge(self, other: Evaluation) -> Evaluation:  # type: ignore[override]
        """Sums of both."""
        return jax.tree.map(jnp.add, self, other)

    def compute(self) -> dict[str, Any]:
        """Figures: shares in [0, 1], loss in nats, and lists by class.

        `per_class` is NaN for a class without photographs. `calibration_error` is the mean distance
        of confidence and accuracy over bins, weighted by photographs.
        """
        one = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self)
        count = one.confusion.sum()
        if not count:
            raise ValueError("there was no photograph to evaluate that could be read")
        each = one.confusion.sum(axis=1)
        return {
            "accuracy": float(np.trace(one.confusion) / count),
            "top5": float(one.top5 / count),
            "loss": float(one.loss / count),
            "calibration_error": float(np.abs(one.confidence - one.right).sum() / count),
            "examples": int(count),
            "per_class": np.divide(
                np.diag(one.confusion), each, out=np.full(len(each), np.nan), where=each > 0
            ),
            "confusion": one.confusion.astype(int),
        }


def evaluate(
    step: Callable[[Any, Mapping[str, Array]], Evaluation],
    params: Any,
    batches: Iterable[Mapping[str, Array]],
) -> dict[str, Any]:
    """Runs over a split.

    Args:
      step: from `make_eval_step`, jitted.
      params: parameters.
      batches: on the devices.

    Returns:
      The figures of `Evaluation.compute`.
    """
    total = None
    for batch in batches:
        found = step(params, batch)
        total = found if total is None else total.merge(found)
    if total is None:
        raise ValueError("there was no batch to evaluate")
    return jax.device_get(total).compute()


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those figures that are one number."""
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
