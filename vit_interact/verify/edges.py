"""Do indicators rank interactions by what cutting them does? Edges really cut, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import Images, ViT
from vit_interact.observe.ablation import ablate_edges
from vit_interact.observe.measure import measure_with_logits
from vit_interact.observe.probe import Score, make_score

Keys = Sequence[int] | Int[np.ndarray, " B"] | None
Vector = Float[np.ndarray, " E"]


class EdgeTest(NamedTuple):
    """Edges that were really cut, and what indicators say of them.

    Attributes:
      edges: `[E, 4]`: image, layer, `i`, `j`; sorted by image, then layer.
      change: score with the edge cut minus score without, float64 `[E]`, in units of the score.
      values: indicator name to its float32 value at each edge `[E]`.
      left_out: queries of all images and layers that cannot affect the output, so never chosen.
      score: whose change: the class of each image `[B]`, or a function of the logits.
    """

    edges: np.ndarray
    change: np.ndarray
    values: dict[str, np.ndarray]
    left_out: int
    score: Any


def reaching_queries(config: ViTConfig) -> Bool[np.ndarray, "L N"]:
    """Which queries can affect the output: in the last layer only those that the head reads."""
    layout = config.layout
    reaching = np.ones((config.depth, layout.num_tokens), bool)
    if config.pool != "map":
        reaching[-1, layout.prefix :] = config.pool != "cls"
        reaching[-1, : layout.prefix] = False
        reaching[-1, : 1 + config.distilled] |= config.pool != "gap"
    return reaching


def choose_edges(
    attention: Float[np.ndarray, "L B N N"],
    config: ViTConfig,
    per_layer: int = 8,
    seed: int = 0,
    image_keys: Keys = None,
) -> tuple[Int[np.ndarray, "E 4"], int]:
    """Random edges, stratified over layers and over the strength of attention.

    In each image and layer, edges `i != j` of queries that can affect the output are sorted by
    attention and split into `per_layer` bins of equal size; one edge comes from each bin. An
    image's edges depend on the seed, its key and its attention alone, not on the batch.

    Args:
      attention: mean attention weights of all layers.
      config: the model's.
      per_layer: edges for each image and layer.
      seed: not negative.
      image_keys: a number of each image, not negative; None is its place.

    Returns:
      Edges (image, layer, `i`, `j`), `E = B * L * per_layer`, sorted by image, layer and bin; and
      how many queries of all images and layers were left out.

    Raises:
      ValueError: when attention or keys do not fit, or a layer has fewer edges than `per_layer`.
    """
    reaching = reaching_queries(config)
    (depth, tokens), batch = reaching.shape, attention.shape[1]
    if attention.shape != (depth, batch, tokens, tokens):
        raise ValueError(
            f"attention is {attention.shape}; expected ({depth}, B, {tokens}, {tokens})"
        )
    pairs = [np.argwhere(queries[:, None] & ~np.eye(tokens, dtype=bool)) for queries in reaching]
    if not 1 <= per_layer <= min(map(len, pairs)):
        raise ValueError(f"per_layer={per_layer}: a layer has {min(map(len, pairs))} edges")
    edges = np.zeros((batch, depth, per_layer, 4), np.int64)
    for image, key in enumerate(image_numbers(image_keys, batch)):
        rng = np.random.default_rng([seed, int(key)])
        for layer, own in enumerate(pairs):
            order = np.argsort(attention[layer, image][tuple(own.T)], kind="stable")
            chosen = [rng.choice(part) for part in np.array_split(order, per_layer)]
            edges[image, layer, :, :2] = image, layer
            edges[image, layer, :, 2:] = own[chosen]
    return edges.reshape(-1, 4), batch * int((~reaching).sum())


def edge_test(
    model: ViT,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str],
    per_layer: int = 8,
    seed: int = 0,
    image_keys: Keys = None,
    batch_size: int = 32,
    score: Score = "predicted",
) -> EdgeTest:
    """Really cuts edges of `choose_edges` in float64, and reads what `vi.measure` says of them.

    Args:
      model: our `ViT`; measured in its own compute type.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`.
      indicators: names of `interactions.INDICATORS`.
      per_layer: edges for each image and layer.
      seed: of the choice of edges.
      image_keys: as for `choose_edges`.
      batch_size: images, and edges, at a time.
      score: as for `vi.measure`; `predicted` is the class that the model predicts when measured.

    Raises:
      ValueError: for a model that is not our `ViT`, unknown indicators, or as `choose_edges` does.
    """
    check_ours(model)
    keys, left_out, found = image_numbers(image_keys, len(images)), 0, []
    names = tuple(dict.fromkeys(("attention", *indicators)))
    for rows, chunk, own in image_batches(images, score, batch_size):
        logits, maps = measure_with_logits(model, params, chunk, names, own)
        attention = np.asarray(maps["attention"], np.float32)[:, : len(rows)]
        edges, left = choose_edges(attention, model.config, per_layer, seed, keys[rows])
        # One class for both: float64 may break a tie between two classes the other way.
        own = np.argmax(logits, -1) if isinstance(own, str) else own
        change = ablate_edges(model, params, chunk, edges, own, batch_size)
        classes = np.zeros(len(rows), int) if callable(own) else np.asarray(own)[: len(rows)]
        values = [at_edges(maps[name], edges) for name in indicators]
        found.append((edges + np.array([rows[0], 0, 0, 0]), change, classes, *values))
        left_out += left
    edges, change, classes, *values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    named = dict(zip(indicators, values, strict=True))
    return EdgeTest(edges, change, named, left_out, score if callable(score) else classes)


def spearman(a: Vector, b: Vector) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank.

    NaN when one side is constant, has fewer than 2 values or holds a NaN.
    """
    if len(a) < 2 or np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def rank_agreement(
    test: EdgeTest, indicator: str, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """How well an indicator ranks edges by the size of the score's change.

    Returns:
      `pooled`: Spearman's rho over all edges; `within`: mean over (image, layer) of the rho inside,
      where it is defined; `bootstrap`: (low, high), the 95 % interval of `pooled` with images
      resampled, NaN for a single image.

    Raises:
      ValueError: for an indicator that the test does not have.
    """
    check_known((indicator,), test.values)
    truth, values = np.abs(test.change), test.values[indicator]
    image, layer = test.edges[:, 0], test.edges[:, 1]
    by_image = [np.flatnonzero(image == n) for n in np.unique(image)]
    groups = [rows[layer[rows] == n] for rows in by_image for n in np.unique(layer[rows])]
    inside = np.array([spearman(truth[rows], values[rows]) for rows in groups])
    inside = inside[~np.isnan(inside)]
    # Edges of one image depend on each other; images do not.
    draws = np.random.default_rng(seed).integers(len(by_image), size=(resamples, len(by_image)))
    picks = (np.concatenate([by_image[n] for n in draw]) for draw in draws)
    rhos = [spearman(truth[rows], values[rows]) for rows in picks]
    low, high = np.quantile(rhos if len(by_image) > 1 else [np.nan], (0.025, 0.975))
    return {
        "pooled": spearman(truth, values),
        "within": float(inside.mean()) if len(inside) else float("nan"),
        "bootstrap": (float(low), float(high)),
    }


def image_batches(
    images: Images, score: Score, size: int
) -> Iterator[tuple[np.ndarray, Array, Score]]:
    """Row numbers, images and score of each batch; the last is padded, to compile only once."""
    size = min(size, len(images))
    _, classes = make_score(score, len(images))
    for start in range(0, len(images), size):
        padded = np.minimum(np.arange(start, start + size), len(images) - 1)
        rows = np.arange(start, min(start + size, len(images)))
        yield rows, jnp.asarray(images[padded]), score if classes is None else classes[padded]


def at_edges(indicator: Array, edges: np.ndarray) -> np.ndarray:
    """An indicator `[L, B, N, N]` at edges `[E, 4]`."""
    image, layer, i, j = edges.T
    return np.asarray(indicator[layer, image, i, j], np.float32)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def image_numbers(image_keys: Keys, batch: int) -> np.ndarray:
    """What randomness of each image depends on: its key, or its place."""
    keys = np.arange(batch) if image_keys is None else np.asarray(image_keys)
    if keys.shape != (batch,):
        raise ValueError(f"image_keys have shape {keys.shape}; expected one for each of {batch}")
    return keys


def check_ours(model: Any) -> None:
    """Refuses models that cannot be run on from a layer."""
    if not isinstance(model, ViT):
        raise ValueError("faithfulness needs vit_interact's ViT, whose edges can be cut")


def check_known(names: Sequence[str], known: Any) -> None:
    """Refuses names that are not among the known ones."""
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"there is no {missing} here; known: {', '.join(known)}")
