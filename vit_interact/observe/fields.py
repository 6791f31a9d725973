"""Reduces a probed layer to received impact, windows and responsive fields, block by block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vit_interact.interactions.fields import ResponsiveField
from vit_interact.interactions.head_terms import Head
from vit_interact.interactions.removal import impact_of_rows
from vit_interact.interactions.streaming import Fields, fields_of_columns, fields_of_map
from vit_interact.layout import TokenLayout
from vit_interact.models.attend import Attended
from vit_interact.models.blocks import Summed
from vit_interact.observe.maps import Maps

_IMPACT, _WINDOWS = "received_impact", "windows"


@dataclasses.dataclass(frozen=True)
class FieldsOf:
    """Makes `Fields` of indicators; hashable, so that it can be static under `jit`.

    A layer's part is a dict of float32 arrays named `INDICATOR/what`, as the backward pass can only
    return floats; whole numbers of patches are exact in them.

    Attributes:
      layout: the order of the tokens.
      coverages: of windows.
      several: whether windows have an axis of coverages.
    """

    layout: TokenLayout
    coverages: tuple[float, ...]
    several: bool

    @property
    def image_axes(self) -> Fields:
        """Where the result's arrays have their images: behind layers, and coverages of windows."""
        return Fields(1, 1 + self.several, 1)  # type: ignore[arg-type]

    def reducing(self, maps: Maps) -> Reducing:
        """A reduction of blocks (`Taps.blocks`) from one to rows of indicators."""
        return Reducing(self, maps)

    def shapes(self, names: tuple[str, ...], batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What one layer gives for all queries, of a batch."""
        patches = (batch, self.layout.num_patches)
        trailing = {_IMPACT: (), _WINDOWS: (len(self.coverages), 4)}
        trailing |= dict.fromkeys(ResponsiveField._fields, ()) | {"tendency": (2,), "axes": (2,)}
        return {
            f"{name}/{what}": jax.ShapeDtypeStruct((*patches, *last), jnp.float32)
            for name in names
            for what, last in trailing.items()
        }

    def gather(self, name: str, layers: list[dict[str, Array]]) -> Fields:
        """The result for one indicator from what the layers gave."""

        def stack(what: str) -> Array:
            return jnp.stack([layer[f"{name}/{what}"] for layer in layers])

        windows = jnp.moveaxis(stack(_WINDOWS).astype(jnp.int32), -2, 0)
        field = ResponsiveField(*(stack(what) for what in ResponsiveField._fields))
        return Fields(stack(_IMPACT), windows if self.several else windows[0], field)

    def of_map(self, maps: Array) -> Fields:
        """The same from whole maps."""
        coverage = self.coverages if self.several else self.coverages[0]
        return fields_of_map(maps, self.layout, coverage)


@dataclasses.dataclass(frozen=True)
class Reducing:
    """Blocks of attention to fields; hashable as what it holds.

    Attributes:
      fields: what is made.
      maps: of rows of indicators by name.
    """

    fields: FieldsOf
    maps: Maps

    def __call__(self, attended: Attended, *g: Array) -> dict[str, Any]:
        """The part of one block of whole columns, or of the prefix tokens."""
        return self._of_rows(self.maps(attended, *g), attended.queries, attended.prefix)

    def of_head(self, head: Head) -> dict[str, Array]:
        """What a head adds to rows."""
        return self.maps.of_head(head)

    def finish(
        self, totals: dict[str, Array], heads: int, queries: Any, prefix: bool
    ) -> dict[str, Any]:
        """The same part from sums over heads."""
        return self._of_rows(self.maps.finish(totals, heads), queries, prefix)

    def _of_rows(self, maps: dict[str, Array], queries: Any, prefix: bool) -> dict[str, Any]:
        layout = self.fields.layout
        found: dict[str, Any] = {}
        assert queries is not None
        for name, rows in maps.items():
            if name == "rollout":  # it mixes layers: its map is needed
                found[name] = rows
                continue
            found[f"{name}/{_IMPACT}"] = Summed(impact_of_rows(rows, queries, layout))
            if prefix:
                continue
            windows, field = fields_of_columns(rows, queries, layout, self.fields.coverages)
            found[f"{name}/{_WINDOWS}"] = windows.astype(jnp.float32)
            found |= {f"{name}/{what}": value for what, value in field._asdict().items()}
        return found
