"""The data of one image as drawings take it: of a dataset, or plain arrays.

Processes that only draw need not import xarray and pandas, which takes longer than Matplotlib.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass(frozen=True)
class Values:
    """A variable of `PlainImage`."""

    values: np.ndarray

    def item(self) -> Any:
        """The only value."""
        return self.values.item()


@dataclasses.dataclass(frozen=True)
class PlainImage:
    """What drawings ask of an `xarray.Dataset` of one image.

    Attributes:
      variables: those of the dataset and its coordinates.
      sizes: of dimensions, by name.
      coords: names of the coordinates.
      attrs: of the dataset.
    """

    variables: dict[str, Values]
    sizes: dict[str, int]
    coords: frozenset[str]
    attrs: dict[str, Any]

    @classmethod
    def of(cls, data: xr.Dataset) -> PlainImage:
        """The same in memory."""
        return cls(
            {str(name): Values(np.asarray(variable)) for name, variable in data.variables.items()},
            {str(name): size for name, size in data.sizes.items()},
            frozenset(map(str, data.coords)),
            dict(data.attrs),
        )

    @property
    def dims(self) -> dict[str, int]:
        """As `sizes`."""
        return self.sizes

    def __getitem__(self, name: str) -> Values:
        """A variable."""
        return self.variables[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is such a variable."""
        return name in self.variables

    def __iter__(self) -> Iterator[str]:
        """Names of variables that are no coordinates."""
        return (name for name in self.variables if name not in self.coords)


ImageData: TypeAlias = "xr.Dataset | PlainImage"
