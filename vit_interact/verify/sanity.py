"""Does an indicator notice that the weights are not the model's any more?"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.models.vit import Images, ViT
from vit_interact.observe.measure import measure_with_logits
from vit_interact.verify.edges import (
    EdgeTest,
    at_edges,
    check_known,
    check_ours,
    image_batches,
    spearman,
)

# What reads the last block's output; a model has some of these.
_HEADS = ("head", "head_dist", "MAPHead_0", "pool_norm")


def sanity_test(
    model: ViT,
    params: Mapping[str, Any],
    images: Images,
    test: EdgeTest,
    indicators: Sequence[str],
    seed: int = 0,
    batch_size: int = 32,
) -> dict[int, dict[str, dict[str, float]]]:
    """Measures again with weights redrawn from the top down (cascading; Adebayo et al. 2018).

    An indicator that does not notice describes the picture and not the model. Classes stay those
    of the test, so that nothing but the weights differs.

    Args:
      model: our `ViT`, not scanned.
      params: its parameters.
      images: those of the test.
      test: of `edge_test`.
      indicators: some of the test's.
      seed: of the fresh weights.
      batch_size: images at a time.

    Returns:
      Number of redrawn blocks, 0 to `L`, to indicator to `{"truth": rho with the original model's
      |change|, "original": rho with the original's indicator}`. From 1 block on, all that follows
      the blocks is redrawn too; what precedes them never is.

    Raises:
      ValueError: for a scanned model, or indicators that the test does not have.
    """
    values = redrawn_values(model, params, images, test, indicators, seed, batch_size)
    return sanity_agreement(test, values, indicators)


def redrawn_values(
    model: ViT,
    params: Mapping[str, Any],
    images: Images,
    test: EdgeTest,
    indicators: Sequence[str],
    seed: int = 0,
    batch_size: int = 32,
) -> Float[np.ndarray, "redrawn indicators E"]:
    """What indicators say of a test's edges with 0 to `L` blocks redrawn, as in `sanity_test`."""
    check_ours(model)
    check_known(indicators, test.values)
    depth = model.config.depth
    if model.config.scan:
        raise ValueError("sanity_test redraws single blocks; give it the model with scan=False")
    fresh = _fresh(model, jnp.asarray(images[:1]), seed)
    values = np.zeros((depth + 1, len(indicators), len(test.edges)), np.float32)
    for count in range(depth + 1):
        redrawn = redraw(params, fresh, count, depth)
        for rows, chunk, own in image_batches(images, test.score, batch_size):
            _, maps = measure_with_logits(model, redrawn, chunk, tuple(indicators), own)
            here = np.isin(test.edges[:, 0], rows)
            edges = test.edges[here] - [rows[0], 0, 0, 0]
            values[count][:, here] = [at_edges(maps[name], edges) for name in indicators]
    return values


@functools.partial(jax.jit, static_argnames="model")
def _fresh(model: ViT, images: Array, seed: int | Array) -> Any:
    return model.init(jax.random.key(seed), images)["params"]


def sanity_agreement(
    test: EdgeTest,
    values: Float[np.ndarray, "redrawn indicators E"],
    indicators: Sequence[str],
) -> dict[int, dict[str, dict[str, float]]]:
    """Rank correlations of redrawn indicators with what the original model did and said."""
    truth = np.abs(test.change)
    return {
        count: {
            name: {"truth": spearman(new, truth), "original": spearman(new, test.values[name])}
            for name, new in zip(indicators, row, strict=True)
        }
        for count, row in enumerate(values)
    }


def redraw(
    params: Mapping[str, Any], fresh: Mapping[str, Any], count: int, depth: int
) -> dict[str, Any]:
    """Parameters with `fresh` ones in the last `count` blocks and, unless 0, all behind them."""
    blocks = [f"encoderblock_{layer}" for layer in range(depth - count, depth)]
    changed = {*blocks, "encoder_norm", *_HEADS} if count else set()

    def pick(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (new if name in changed else old)[name] for name in old}

    inner = pick(params["Transformer"], fresh["Transformer"])
    return {**pick(params, fresh), "Transformer": inner}
