"""What is verified: a model as a few functions of arrays, ours or anybody's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Array

from vit_interact.layout import TokenLayout
from vit_interact.models.vit import ViT
from vit_interact.observe.measure import measure

MeasureKept = Callable[[Any, Array, Sequence[str], Array, Array], Mapping[str, Array]]
MeasureInside = Callable[[Any, Array, Sequence[str], Sequence[Array], Array], Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
      layout: which token is which patch.
      depth: attention layers `L`.
      apply: `(params, images, masks) -> logits [B, classes]`; `masks` is None or a list with a
        boolean `[B, N, N]` for each layer, True = attend.
      measure: `(params, images, indicators) -> name to [L, B, N, N]`.
      drop: `(params, images, keep) -> logits` on the patches `keep`, int `[B, K]`, alone; None when
        the model cannot shorten its sequence.
      reaching: layers in which the rows of patches can change the logits. In the last layer of a
        class-token model they cannot: windows there cost nothing, so their area does not count.
      class_token: whether token 0 is a class token.
      measure_kept: `(params, images, indicators, keep, classes) -> name to [L, B, T + K, T + K]` on
        the patches `keep` alone, gradients being of the logits of `classes` `[B]`; None as `drop`.
      measure_inside: `(params, images, indicators, masks, classes) -> name to [L, B, N, N]` under
        the masks of `apply`, gradients as above; None when it cannot be measured so.
    """

    layout: TokenLayout
    depth: int
    apply: Callable[[Any, Array, Sequence[Array] | None], Array]
    measure: Callable[[Any, Array, Sequence[str]], Mapping[str, Array]]
    drop: Callable[[Any, Array, Array], Array] | None = None
    reaching: tuple[int, ...] = ()
    class_token: bool = False
    measure_kept: MeasureKept | None = None
    measure_inside: MeasureInside | None = None

    def __post_init__(self) -> None:
        if not self.reaching:
            object.__setattr__(self, "reaching", tuple(range(self.depth)))

    @classmethod
    def of(cls, model: ViT) -> Subject:
        """Our ViT as a subject.

        Raises:
          ValueError: for a model without classes, since verification is about predictions.
        """
        config = model.config
        if not config.has_classes:
            raise ValueError("these weights have no classes: verification needs a classifier")

        def apply(params: Any, images: Array, masks: Sequence[Array] | None) -> Array:
            mask = None if masks is None else list(masks)
            logits: Any = model.apply({"params": params}, images, mask=mask)
            return logits

        def measured(params: Any, images: Array, names: Sequence[str]) -> Mapping[str, Array]:
            return measure(model, params, images, tuple(names))

        def drop(params: Any, images: Array, keep: Array) -> Array:
            logits: Any = model.apply({"params": params}, images, keep=keep)
            return logits

        def measure_kept(
            params: Any, images: Array, names: Sequence[str], keep: Array, classes: Array
        ) -> Mapping[str, Array]:
            return measure(model, params, images, tuple(names), score=classes, keep=keep)

        def measure_inside(
            params: Any, images: Array, names: Sequence[str], masks: Sequence[Array], classes: Array
        ) -> Mapping[str, Array]:
            return measure(model, params, images, tuple(names), score=classes, mask=list(masks))

        last = config.depth - 1 if config.pool == "cls" and config.depth > 1 else config.depth
        return cls(
            config.layout, config.depth, apply, measured, drop, tuple(range(last)),
            config.cls_token, measure_kept, measure_inside,
        )  # fmt: skip
