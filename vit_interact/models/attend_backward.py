"""The derivative of attention, which shares its weights with indicators that need gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_interact.interactions.by_head import is_single
from vit_interact.models.attend import (
    Attended,
    Backward,
    QueryBlocks,
    attend_in_blocks,
    heads_apart,
    over_blocks,
    rows_of,
)
from vit_interact.models.attend_heads import (
    OverHeads,
    along_output,
    gradients_of_rows,
    gradients_over_heads,
)
from vit_interact.models.attend_images import images_apart, over_images
from vit_interact.models.blocks import Summed
from vit_interact.models.narrow import units_take
from vit_interact.models.softmax import HeadsJoined, Rows, heads_first, without_batch

_QUERY, _KEY, _VALUE, _BIAS = "dquery", "dkey", "dvalue", "dbias"


def attention_gradients(
    attended: Attended,
    output: Float[Array, "*B M H K"],
    grad: Float[Array, "*B M H K"],
    bias: Float[Array, "..."] | None = None,
) -> tuple[tuple[Array, Array, Array, Array | None], Backward]:
    """Derivatives of a score by query, key, value and bias, and what was made on the way.

    Args:
      attended: of all queries, or of some: those by key and value are then their part of a sum.
      output: its output.
      grad: derivative of the score by `output`.
      bias: that the logits got, for its shape; None for none.
    """
    if bias is None and is_single(batch := grad.shape[:-3]):
        names = ("query", "key", "values", "weights")
        one = without_batch(*(getattr(attended, name) for name in names))
        alone = attended._replace(**dict(zip(names, one, strict=True)))
        (*sides, _), made = attention_gradients(alone, *without_batch(output, grad))
        whole = [one.reshape(*batch, *one.shape) for one in (*sides, *made)]
        return (whole[0], whole[1], whole[2], None), Backward(*whole[3:])
    # Products of wider numbers are as fast apart (docs/performance.md).
    join = HeadsJoined.of(grad, bias, None) if units_take(grad.dtype) else HeadsJoined(None)
    given = (attended.query, attended.key, attended.values, grad, along_output(grad, output))
    q, k, v, g, known = jax.tree.map(join.taken, given)
    weights = attended.weights.reshape(*q.shape[:-2], *attended.weights.shape[-2:])
    gradients, dlogits, along = gradients_of_rows(weights, q, k, v, g, known)
    gradients, dlogits, along = jax.tree.map(join.given, (gradients, dlogits, along))
    dbias = None
    if bias is not None:
        spread = jax.vjp(lambda bias: jnp.broadcast_to(bias, dlogits.shape), bias)[1]
        (dbias,) = spread(dlogits.astype(bias.dtype))
    dquery, dkey, dvalue = map(heads_first, gradients)  # and back
    return (dquery, dkey, dvalue, dbias), Backward(dlogits, along.squeeze(-1))


def gradients_in_blocks(
    inputs: tuple[Any, ...],
    blocks: QueryBlocks,
    reduce: Callable[..., dict[str, Any]],
    output: Float[Array, "*B N H K"],
    grad: Float[Array, "*B N H K"],
    rows: Rows | None = None,
) -> tuple[tuple[Any, ...], dict[str, Array]]:
    """Derivatives by query, key, value and bias, and what `reduce` gives, block by block.

    Args:
      inputs: as for `attend_in_blocks`.
      blocks: which queries are worked on together.
      reduce: as for `attend_in_blocks`; gets `Attended` with `backward`.
      output: of the layer.
      grad: derivative of the score by `output`.
      rows: of the softmax `[*B, N, H, 1]`, if known.
    """
    if (together := images_apart(blocks.images, inputs)) is not None:

        def of_images(some: tuple[Any, ...], *known: Any) -> Any:
            return gradients_in_blocks(some, blocks, reduce, *known)

        return over_images(of_images, together, inputs, output, grad, rows)
    query, key, value, bias, mask, out_kernel = inputs
    tokens = key.shape[-3]
    if heads_apart(blocks, bias) and isinstance(reduce, OverHeads):

        def of_heads(some: tuple[Any, ...], queries: Any, prefix: bool) -> dict[str, Any]:
            q, *known = some
            some = (q, key, value, rows_of(mask, queries, tokens), out_kernel)
            heads = blocks.heads or 1
            (dq, dk, dv), totals = gradients_over_heads(some, *known, heads, reduce.of_head)
            found = reduce.finish(totals, query.shape[-2], queries, prefix)
            return {_QUERY: dq, _KEY: Summed(dk), _VALUE: Summed(dv), **found}

        found = over_blocks(of_heads, blocks, query, grad, output, rows)
        return (found.pop(_QUERY), found.pop(_KEY), found.pop(_VALUE), None), found
    leaves, form = jax.tree.flatten(bias)

    def both(attended: Attended, g: Array) -> dict[str, Any]:
        rows, spread = None, None
        if bias is not None:
            rows, spread = jax.vjp(lambda bias: rows_of(bias, attended.queries, tokens), bias)
        (*sides, by_rows), made = attention_gradients(attended, attended.output, g, rows)
        found = {_QUERY: sides[0], _KEY: Summed(sides[1]), _VALUE: Summed(sides[2])}
        if spread is not None:
            parts = jax.tree.leaves(spread(by_rows))
            found |= {f"{_BIAS}{place}": Summed(part) for place, part in enumerate(parts)}
        return found | reduce(attended._replace(backward=made), g)

    _, found = attend_in_blocks(inputs, blocks, both, grad, output, rows)
    parts = [found.pop(f"{_BIAS}{place}") for place in range(len(leaves))]
    by_bias = jax.tree.unflatten(form, parts)
    return (found.pop(_QUERY), found.pop(_KEY), found.pop(_VALUE), by_bias), found
