"""The bias by which patches attend within soft windows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class SeparableBias:
    """An additive bias on patch-to-patch logits that is a sum of a row and a column factor.

    The logit of query patch `i` and key patch `(r, c)` gets `rows[..., i, r] + cols[..., i, c]`.
    Prefix tokens get none.

    Attributes:
      rows: `[B, H', P, R]`, `H'` being 1 or the number of heads.
      cols: `[B, H', P, C]`.
    """

    # Any, since transformations of jax put placeholders into trees.
    rows: Any
    cols: Any

    def full(self, tokens: int) -> Float[Array, "B G N N"]:
        """The bias over all `tokens`, 0 for the prefix tokens that stand before the patches."""
        total = self._boxes()
        prefix = tokens - total.shape[-1]
        return jnp.pad(total, [(0, 0)] * (total.ndim - 2) + [(prefix, 0)] * 2)

    def of_queries(self, queries: Int[Array, " M"] | Int[np.ndarray, " M"], tokens: int) -> Array:
        """Rows `[B, H', M, N]` of `full`, for the tokens `queries`."""
        prefix = tokens - self.rows.shape[-1] * self.cols.shape[-1]
        patch = jnp.maximum(jnp.asarray(queries) - prefix, 0)
        picked = SeparableBias(jnp.take(self.rows, patch, -2), jnp.take(self.cols, patch, -2))
        total = jnp.where(jnp.asarray(queries)[:, None] >= prefix, picked._boxes(), 0)
        return jnp.pad(total, [(0, 0)] * (total.ndim - 1) + [(prefix, 0)])

    def _boxes(self) -> Array:
        total = self.rows[..., :, :, None] + self.cols[..., :, None, :]
        return total.reshape(*total.shape[:-2], -1)
