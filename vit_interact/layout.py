"""Which token is which patch: the one place that knows."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Order of the tokens of a Vision Transformer: prefix tokens first, then patches row by row.

    Hashable and immutable, so it can be a static argument of `jax.jit`.

    Attributes:
      rows: rows `R` of the patch grid.
      cols: columns `C` of the patch grid.
      prefix: prefix tokens `T` (class, distillation, registers) in front of the patches.

    Raises:
      ValueError: if the grid is empty or `prefix` is negative.
    """

    rows: int
    cols: int
    prefix: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.prefix < 0:
            raise ValueError(
                f"a layout needs rows >= 1, cols >= 1 and prefix >= 0, got rows={self.rows}, "
                f"cols={self.cols}, prefix={self.prefix}"
            )

    @property
    def num_patches(self) -> int:
        """`P = R * C`."""
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        """`N = T + P`."""
        return self.prefix + self.num_patches

    def positions(self) -> np.ndarray:
        """(row, col) of every patch in patches, int32 `[P, 2]`."""
        grid = np.mgrid[: self.rows, : self.cols].reshape(2, -1).T
        return np.ascontiguousarray(grid, dtype=np.int32)

    def check_patches(self, shape: tuple[int, ...], what: str) -> None:
        """Raises ValueError unless the two last axes of `shape` are `[P, P]` of this layout."""
        self._check(shape, self.num_patches, what, "patches")

    def check_tokens(self, shape: tuple[int, ...], what: str) -> None:
        """Raises ValueError unless the two last axes of `shape` are `[N, N]` of this layout."""
        self._check(shape, self.num_tokens, what, "tokens")

    def _check(self, shape: tuple[int, ...], size: int, what: str, unit: str) -> None:
        if len(shape) < 2 or tuple(shape[-2:]) != (size, size):
            raise ValueError(
                f"{what} has shape {tuple(shape)}, but {self} has {size} {unit}: "
                f"expected [..., {size}, {size}]"
            )
