"""Reductions of an attention layer to maps of indicators."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from vit_interact.interactions.head_terms import TERMS, Head
from vit_interact.interactions.indicators import (
    INDICATORS,
    NEEDS,
    edge_of_logits,
    gradient_of_logits,
)
from vit_interact.models.attend import Attended, Weightless


@dataclasses.dataclass(frozen=True)
class Maps:
    """Indicators of one layer, of all heads at once or summed over them (`OverHeads`).

    `rollout` contributes the layer's mean attention.

    Attributes:
      names: of the indicators.
    """

    names: tuple[str, ...]

    def __call__(self, attended: Attended | Weightless, g: Array | None = None) -> dict[str, Any]:
        """The maps; `g` is the gradient of the layer's output, for those that need it."""
        return {name: _evaluate(name, attended, g) for name in self.names}

    def of_head(self, head: Head) -> dict[str, Float[Array, "*heads M N"]]:
        """What a head adds."""
        return {name: TERMS[name].of(head) for name in self.names}

    def finish(
        self, totals: dict[str, Array], heads: int, queries: Any = None, prefix: bool = False
    ) -> dict[str, Float[Array, "*B M N"]]:
        """The maps from sums over heads."""
        del queries, prefix
        return {name: TERMS[name].finish(totals[name], heads) for name in self.names}


def needs_backward(name: str) -> bool:
    """Whether an indicator takes the gradient of a layer's output."""
    return "output_grad" in NEEDS[name]


def _evaluate(name: str, attended: Attended | Weightless, g: Array | None) -> Any:
    source = "attention" if name == "rollout" else name
    if not isinstance(attended, Attended):
        return attended.later(source) if g is None else attended.indicator(source, g)
    made = attended.backward
    if made is not None and name == "gradient":
        return gradient_of_logits(attended.weights, made.logits, made.along)
    if made is not None and name == "edge":
        return edge_of_logits(attended.weights, made.logits)
    tensors = {
        "weights": attended.weights,
        "values": attended.values,
        "out_kernel": attended.out_kernel,
        "output_grad": g,
    }
    for need in NEEDS[source]:
        if tensors[need] is None:
            raise ValueError(f"{name} needs {need}, which this model's attention does not expose")
    more = {"output": attended.output} if name == "leave_one_out" else {}
    return INDICATORS[source](*(tensors[need] for need in NEEDS[source]), **more)
