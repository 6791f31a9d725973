"""The mathematics of attention as pure functions: with its weights, and block by block.

Rows of attention do not depend on one another. `attend_in_blocks` therefore makes the weights of a
few queries at a time and reduces them at once; the weights of a whole layer, `[B, H, N, N]`, never
exist, neither forward nor backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.interactions.by_head import is_single
from vit_interact.layout import TokenLayout
from vit_interact.models.attend_heads import OverHeads, attend_over_heads
from vit_interact.models.attend_images import images_apart, over_images
from vit_interact.models.bias import SeparableBias
from vit_interact.models.blocks import Places, Summed, join, map_blocks, pick
from vit_interact.models.cpu import can_split_images, on_cpu
from vit_interact.models.softmax import (
    ROWS,
    HeadsJoined,
    Rows,
    attention_logits,
    heads_first,
    softmax_of,
    softmax_parts,
    without_batch,
)

WEIGHT_BYTES = 16 * 2**20
"""Attention weights that exist at a time, when nothing else is asked for (docs/kernels.md)."""

HEAD_BYTES = 4 * 2**20
"""The same for maps that are made over heads (`attend_heads.py`)."""

ACCELERATOR_BYTES = 512 * 2**20
"""The same for all on an accelerator, which wants larger pieces of work."""

SMALLEST_BLOCK = 256
"""Queries in a block at least: of fewer, what is done anew for each block takes over."""

_OUTPUT = "output"


class Backward(NamedTuple):
    """What a layer's backward pass makes on its way, float32 or wider.

    Attributes:
      logits: derivative of a score by the logits, `[B, H, M, N]`.
      along: `g · o` of each query and head, `[B, H, M]`.
    """

    logits: Array
    along: Array


class Attended(NamedTuple):
    """Everything one attention layer computed, for all its queries or a block of them.

    Attributes:
      query: `[B, M, H, K]`, scaled by `1/sqrt(K)`.
      key: `[B, N, H, K]`.
      values: `[B, N, H, K]`.
      logits: `[B, H, M, N]` after mask and bias, float32 or wider.
      weights: `[B, H, M, N]`, rows sum to 1, float32 or wider.
      output: `[B, M, H, K]`, one output for each head.
      out_kernel: `[H, K, D]`, multiplied by LayerScale where the model has it; None when unknown.
      queries: which tokens the `M` queries are; None for all, in order.
      prefix: whether they are the prefix tokens and no others.
      backward: what the layer's own backward pass makes; None where it does not take part.
      rows: of the softmax, `[B, M, H, 1]` each; None where nobody made them.
    """

    query: Array
    key: Array
    values: Array
    logits: Array
    weights: Array
    output: Array
    out_kernel: Array | None
    queries: Int[Array, " M"] | Int[np.ndarray, " M"] | None = None
    prefix: bool = False
    backward: Backward | None = None
    rows: Rows | None = None


@runtime_checkable
class Weightless(Protocol):
    """What gives indicators of a layer, but no weights: `tiled.Tiled`."""

    def indicator(self, name: str, g: Array | None = None) -> Array:
        """The map `[B, M, N]` of an indicator; `g` is the gradient of the output."""
        ...

    def later(self, name: str, g: Array | None = None) -> Any:
        """What `tiled.stack_maps` makes maps of several layers from."""
        ...


@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """Which queries are worked on together. Hashable, so that it can be static under `jit`.

    Attributes:
      size: most queries in a block, but for whole columns of the grid.
      layout: None for blocks of neighbouring tokens; else blocks of whole columns of the grid, as
        the search for windows wants them, and one of the prefix tokens.
      heads: how many heads of a block are worked on together, where a reduction is a sum over heads
        and logits get no bias; None for all.
      images: how many images are worked on together, where logits get no bias; None for all.
    """

    size: int
    layout: TokenLayout | None = None
    heads: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        counts = self.size, self.heads, self.images
        if any(count is not None and count < 1 for count in counts):
            raise ValueError(f"a block needs at least one query, head and image, got {self}")

    def groups(self, tokens: int) -> tuple[Int[np.ndarray, "blocks M"], ...]:
        """Numbers of the tokens of each block; blocks of one group have the same size.

        The last block of neighbouring tokens starts early enough to be full: its first queries are
        done twice.
        """
        layout = self.layout
        if layout is None:
            count = -(-tokens // self.size)
            size = -(-tokens // count)
            first = np.minimum(np.arange(count) * size, tokens - size)
            return ((first[:, None] + np.arange(size)).astype(np.int32),)
        most = max(1, self.size // layout.rows)
        together = max(n for n in range(1, layout.cols + 1) if layout.cols % n == 0 and n <= most)
        numbers = layout.prefix + np.arange(layout.num_patches, dtype=np.int32)
        columns = numbers.reshape(layout.rows, layout.cols).T.reshape(-1, together * layout.rows)
        return (np.arange(layout.prefix, dtype=np.int32)[None], columns)[layout.prefix == 0 :]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Asks for the Pallas kernels of `models/tiled.py`; static under `jit`, as `QueryBlocks` is.

    Attributes:
      queries: queries in a tile, a power of two; 0 with `keys=0` for what suits the device.
      keys: keys in a tile, a power of two; a multiple of 128 on a TPU.
      interpret: whose kernels a CPU interprets, "tpu" or "gpu".
    """

    queries: int = 0
    keys: int = 0
    interpret: str = "tpu"

    def __post_init__(self) -> None:
        sides = (self.queries, self.keys)
        if any(sides) and any(side < 16 or side & (side - 1) for side in sides):
            raise ValueError(f"a tile has two sides, powers of two from 16, got {self}")


def suitable_blocks(batch: int, heads: int, queries: int, keys: int) -> QueryBlocks | None:
    """Blocks whose weights take about `WEIGHT_BYTES`; None where two blocks would do.

    On a CPU images are worked on one after the other where blocks are needed, and their queries all
    at once where that allows it: products of many rows are faster than those of several images.
    """
    most = WEIGHT_BYTES if on_cpu() else ACCELERATOR_BYTES
    size = max(most // max(1, 4 * batch * heads * keys), SMALLEST_BLOCK)
    if 2 * size >= queries:
        return None
    if batch == 1 or not can_split_images():
        return QueryBlocks(size)
    alone = suitable_blocks(1, heads, queries, keys) or QueryBlocks(queries)
    return dataclasses.replace(alone, images=1)


def blocks_over_heads(
    batch: int, heads: int, queries: int, keys: int, maps: bool = True
) -> QueryBlocks:
    """Blocks of queries of a few heads, large images one after the other where that can be.

    At most half of the heads, so that less is held than of all; as many as take `HEAD_BYTES`, or
    `WEIGHT_BYTES` where no maps are made, which hold several arrays of that size.
    """
    if batch > 1 and queries > 2 * SMALLEST_BLOCK and can_split_images():
        alone = blocks_over_heads(1, heads, queries, keys, maps)
        return dataclasses.replace(alone, images=1)
    blocks = suitable_blocks(batch, 1, queries, keys) or QueryBlocks(queries)
    of_head = 4 * batch * keys * min(blocks.size, queries)
    most = (HEAD_BYTES if maps else WEIGHT_BYTES) // max(1, of_head)
    at_a_time = max(
        n for n in range(1, max(2, heads // 2 + 1)) if heads % n == 0 and n <= max(1, most)
    )
    return dataclasses.replace(blocks, heads=at_a_time)


def explicit_attention(
    query: Float[Array, "*B N H K"],
    key: Float[Array, "*B M H K"],
    value: Float[Array, "*B M H K"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    out_kernel: Float[Array, "H K D"] | None = None,
    scale_output: bool = False,
    rows: Rows | None = None,
) -> Attended:
    """Attention that keeps its weights. `query` is already scaled; see `Attended` for shapes.

    With `scale_output` the softmax divides rows of the output, `K` numbers each, and not rows of
    the weights, `N` each: faster on XLA's CPU for several short images (docs/kernels.md). It is for
    weights that one elementwise sum or nobody reads; where several do, both would be kept. `rows`
    are those of the softmax, where they are known.
    """
    if is_single(batch := query.shape[:-3]):
        inputs = without_batch(query, key, value, bias, mask)
        known = rows and Rows(*without_batch(*rows))
        one = explicit_attention(
            *inputs, out_kernel=out_kernel, scale_output=scale_output, rows=known
        )
        made = {name: getattr(one, name) for name in ("logits", "weights", "output", "rows")}
        made = jax.tree.map(lambda array: array.reshape(*batch, *array.shape), made)
        return one._replace(query=query, key=key, values=value, **made)
    join = HeadsJoined.of(query, bias, mask)
    q, k, v, known = jax.tree.map(join.taken, (query, key, value, rows))
    logits = attention_logits(q, k, bias, mask)
    if scale_output and known is None:
        factors, found = softmax_parts(logits, mask)
        weights = factors * found.largest
    else:
        weights, found = softmax_of(logits, mask, known)
        factors = weights
    each = jnp.einsum(
        "...ij,...jk->...ik", factors.astype(v.dtype), v, preferred_element_type=logits.dtype
    )
    if factors is not weights:
        each = each * found.largest
    logits, weights, each, found = jax.tree.map(join.given, (logits, weights, each, found))
    output = heads_first(each).astype(value.dtype)  # and back
    rows = Rows(*map(heads_first, found))
    return Attended(query, key, value, logits, weights, output, out_kernel, rows=rows)


def attend_in_blocks(
    inputs: tuple[Any, ...],
    blocks: QueryBlocks,
    reduce: Callable[..., dict[str, Any]] | None = None,
    output_grad: Float[Array, "*B N H K"] | None = None,
    output: Float[Array, "*B N H K"] | None = None,
    rows: Rows | None = None,
    keep: bool = False,
) -> tuple[Float[Array, "*B N H K"], dict[str, Array]]:
    """Attention whose weights exist for one block of queries at a time, forward and backward.

    Args:
      inputs: `(query, key, value, bias, mask, out_kernel)` as `explicit_attention` takes them; the
        bias may be a `SeparableBias`, which is then never made in full.
      blocks: which queries are worked on together.
      reduce: maps the `Attended` of a block, and its gradients `[..., M, H, K]` where `output_grad`
        is given, to arrays `[..., M, ...]` or `Summed` arrays.
      output_grad: derivative of the score by the output.
      output: where it is known already.
      rows: of the softmax, where they are known already.
      keep: whether to give these, too.

    Returns:
      The output, and what `reduce` gave for all queries, in the order of tokens; with `keep` also
      the rows `[*B, N, H, 1]` by their names.
    """
    if (together := images_apart(blocks.images, inputs)) is not None:

        def of_images(some: tuple[Any, ...], *known: Any) -> Any:
            return attend_in_blocks(some, blocks, reduce, *known, keep=keep)

        return over_images(of_images, together, inputs, output_grad, output, rows)
    query, key, value, bias, mask, out_kernel = inputs
    tokens = key.shape[-3]
    sums = reduce if isinstance(reduce, OverHeads) else None
    forward = output_grad is None and output is None
    if forward and heads_apart(blocks, bias) and (sums or reduce is None):

        def of_heads(some: tuple[Any, ...], queries: Any, prefix: bool) -> dict[str, Any]:
            some = (some[0], key, value, rows_of(mask, queries, tokens), out_kernel)
            made, totals = attend_over_heads(some, blocks.heads or 1, sums and sums.of_head, keep)
            known = {name: totals.pop(name) for name in ROWS if keep}
            if sums is not None:
                totals = sums.finish(totals, query.shape[-2], queries, prefix)
            return {_OUTPUT: made, **known, **totals}

        found = over_blocks(of_heads, blocks, query)
        return found.pop(_OUTPUT), found
    # Transposed here once, and back in each block, where that cancels.
    key, value = heads_first(key), heads_first(value)

    def block(some: tuple[Any, ...], queries: Any, prefix: bool) -> dict[str, Any]:
        q, g, o, known = some
        masks = rows_of(bias, queries, tokens), rows_of(mask, queries, tokens)
        sides = heads_first(key), heads_first(value)
        attended = explicit_attention(q, *sides, *masks, out_kernel, scale_output=True, rows=known)
        attended = attended._replace(queries=queries, prefix=prefix)
        if o is not None:
            attended = attended._replace(output=o)
        arguments = (attended,) if g is None else (attended, g)
        found = reduce(*arguments) if reduce else {}
        if keep and attended.rows is not None:
            found |= attended.rows._asdict()
        return found if o is not None else {_OUTPUT: attended.output, **found}

    # Without this, a derivative would keep the weights of all blocks.
    step = jax.checkpoint(block, prevent_cse=False, static_argnums=(2,))
    found = over_blocks(step, blocks, query, output_grad, output, rows)
    return found.pop(_OUTPUT) if output is None else output, found


def heads_apart(blocks: QueryBlocks, bias: Any) -> bool:
    """Whether a sum over heads gets a few at a time."""
    return blocks.heads is not None and bias is None


def over_blocks(
    block: Callable[..., dict[str, Any]],
    blocks: QueryBlocks,
    query: Float[Array, "*B N H K"],
    output_grad: Float[Array, "*B N H K"] | None = None,
    *others: Any,
) -> dict[str, Array]:
    """What a function of a block gives, for all queries in the order of tokens, or added up.

    Args:
      block: of rows of query, gradient and the others, the numbers of their tokens, and whether
        these are the prefix tokens.
      blocks: which queries are worked on together.
      query: of all.
      output_grad: of all; a block may repeat queries, and one of their gradients is then 0.
      *others: further arrays of all, or trees of some; None for none.
    """
    tokens, axis = query.shape[-3], query.ndim - 3
    rows = query, output_grad, *others
    if blocks.layout is None and blocks.size >= tokens:
        found = block(rows, np.arange(tokens), False)
        return {n: one.total if isinstance(one, Summed) else one for n, one in found.items()}
    once = output_grad is not None

    def picked(numbers: np.ndarray) -> Any:
        # A block may repeat queries: one of their gradients is 0, so that sums have it once.
        return jax.tree.map(lambda row: pick(row, numbers, axis, row is output_grad), rows)

    places, parts = [Places.of(numbers) for numbers in blocks.groups(tokens)], []
    for place in places:
        prefix = len(places) > 1 and place is places[0]

        def one(xs: Any, prefix: bool = prefix) -> dict[str, Any]:
            return block(*xs, prefix)

        xs = picked(place.numbers), place.numbers
        parts.append(map_blocks(one, xs, place, axis, query, once))
    return join(parts, places, axis)


def rows_of(whole: Any, queries: Any, tokens: int) -> Array | None:
    """Rows of a bias or mask that broadcasts to `[..., H, N, N]`."""
    if isinstance(whole, SeparableBias):
        return whole.of_queries(queries, tokens)
    if whole is None or whole.shape[-2] == 1:
        return whole
    return jnp.take(whole, queries, axis=-2)
