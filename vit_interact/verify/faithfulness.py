"""Do indicators tell what matters? Edges really cut, groups masked, weights redrawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.layout import TokenLayout
from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import Images, ViT
from vit_interact.observe.ablation import ablate_edges
from vit_interact.observe.measure import measure_with_logits
from vit_interact.observe.probe import Score, make_score

Keys = Sequence[int] | Int[np.ndarray, " B"] | None
Vector = Float[np.ndarray, " E"]

SHARES = (0.01, 0.05, 0.1, 0.2)
# What `edge_places` multiplies an indicator by; times 0, only its random order is left.
_FACTORS = {"top": -1.0, "bottom": 1.0, "random": 0.0}
# What reads the last block's output; a model has some of these.
_HEADS = ("head", "head_dist", "MAPHead_0", "pool_norm")


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


class GroupTest(NamedTuple):
    """What masking a share of the patch-to-patch edges does; keys are (which, share).

    Attributes:
      unmasked: class predicted without a mask `[B]`.
      change: change of that class's logit `[B]`, in logits.
      predictions: class predicted with the mask `[B]`.
    """

    unmasked: np.ndarray
    change: dict[tuple[str, float], np.ndarray]
    predictions: dict[tuple[str, float], np.ndarray]


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
    for image, key in enumerate(_keys(image_keys, batch)):
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
    _check(model, indicators, indicators)
    keys, left_out, found = _keys(image_keys, len(images)), 0, []
    names = tuple(dict.fromkeys(("attention", *indicators)))
    for rows, chunk, own in _batches(images, score, batch_size):
        logits, maps = measure_with_logits(model, params, chunk, names, own)
        attention = np.asarray(maps["attention"], np.float32)[:, : len(rows)]
        edges, left = choose_edges(attention, model.config, per_layer, seed, keys[rows])
        # One class for both: float64 may break a tie between two classes the other way.
        own = np.argmax(logits, -1) if isinstance(own, str) else own
        change = ablate_edges(model, params, chunk, edges, own, batch_size)
        classes = np.zeros(len(rows), int) if callable(own) else np.asarray(own)[: len(rows)]
        values = [_at(maps[name], edges) for name in indicators]
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
    _check(None, (indicator,), test.values)
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


def group_test(
    model: ViT,
    params: Mapping[str, Any],
    images: Images,
    indicator_maps: Float[Array, "L B N N"] | Float[np.ndarray, "L B N N"],
    shares: Sequence[float] = SHARES,
    which: Sequence[str] = tuple(_FACTORS),
    seed: int = 0,
    image_keys: Keys = None,
) -> GroupTest:
    """Masks a share of the patch-to-patch edges (`i != j`) of every layer at once, in float32.

    `round(share * P * (P - 1))` edges of each image and layer are masked: those of the highest
    (`top`) or lowest (`bottom`) raw indicator, or random ones as a control. Equal values, such as
    a layer of zeros, go in random order. One compilation serves all shares and kinds.

    Args:
      model: our `ViT`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`, all run at once.
      indicator_maps: one indicator of all layers, from `vi.measure`.
      shares: of patch-to-patch edges, 0 to 1.
      which: of `top`, `bottom`, `random`.
      seed: of random edges and of the order of equal values.
      image_keys: a number of each image that randomness depends on; None is its place.

    Raises:
      ValueError: for a model that is not our `ViT`, maps that do not fit, or an unknown option.
    """
    _check(model, which, _FACTORS)
    layout, patches = model.config.layout, model.config.layout.num_patches
    expected = (model.config.depth, len(images), layout.num_tokens, layout.num_tokens)
    if indicator_maps.shape != expected:
        raise ValueError(f"indicator_maps have shape {indicator_maps.shape}; expected {expected}")
    if not which or any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares={shares}, which={which}: expected 0 to 1, and at least one kind")
    plain = ViT(dataclasses.replace(model.config, dtype="float32"))
    keys = jnp.asarray(_keys(image_keys, len(images)), jnp.uint32)
    values = jnp.asarray(indicator_maps)[:, :, layout.prefix :, layout.prefix :]
    places = {kind: edge_places(values, keys, seed, _FACTORS[kind]) for kind in which}

    def run(kind: str, share: float) -> np.ndarray:
        count = round(share * patches * (patches - 1))
        return np.asarray(_run_masked(plain, params, jnp.asarray(images), places[kind], count))

    # Without a mask is a mask of nothing through the same program: a share of 0 changes exactly 0.
    base = run(which[0], 0.0)
    rows, unmasked = np.arange(len(images)), base.argmax(-1)
    logits = {(kind, share): run(kind, share) for kind in which for share in shares}
    change = {cut: (each - base)[rows, unmasked] for cut, each in logits.items()}
    return GroupTest(unmasked, change, {cut: each.argmax(-1) for cut, each in logits.items()})


@jax.jit
def edge_places(
    values: Float[Array, "L B P P"], keys: Array, seed: int | Array, factor: float | Array
) -> Int[Array, "L B P P"]:
    """Place of each patch-to-patch edge in ascending `factor * values`; self edges come last.

    Equal values are in an order that is random for each seed, image key and layer.
    """
    itself = jnp.eye(values.shape[-1], dtype=bool)
    flat = jnp.where(itself, jnp.inf, factor * values).reshape(*values.shape[:2], -1)

    def draw(key: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), key)
        return jax.random.uniform(key, (len(flat), flat.shape[-1]))

    order = jnp.lexsort((jax.vmap(draw, out_axes=1)(keys), flat), axis=-1)
    return jnp.argsort(order, axis=-1).reshape(values.shape).astype(jnp.int32)


def edge_masks(
    places: Int[Array, "L B P P"], count: int | Array, layout: TokenLayout
) -> list[Bool[Array, "B N N"]]:
    """For each layer True = attend: all but the first `count` patch-to-patch edges."""
    before = (layout.prefix, 0)
    return list(~jnp.pad(places < count, ((0, 0), (0, 0), before, before)))


@functools.partial(jax.jit, static_argnames="model")
def _run_masked(model: ViT, params: Any, images: Array, places: Array, count: Any) -> Array:
    apply: Any = model.apply
    return apply({"params": params}, images, mask=edge_masks(places, count, model.config.layout))


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
    _check(model, indicators, test.values)
    depth = model.config.depth
    if model.config.scan:
        raise ValueError("sanity_test redraws single blocks; give it the model with scan=False")
    fresh = jax.jit(model.init)(jax.random.key(seed), jnp.asarray(images[:1]))["params"]
    found: dict[int, dict[str, dict[str, float]]] = {}
    for count in range(depth + 1):
        redrawn = redraw(params, fresh, count, depth)
        values = {name: np.zeros(len(test.edges), np.float32) for name in indicators}
        for rows, chunk, own in _batches(images, test.score, batch_size):
            _, maps = measure_with_logits(model, redrawn, chunk, tuple(indicators), own)
            here = np.isin(test.edges[:, 0], rows)
            for name in indicators:
                values[name][here] = _at(maps[name], test.edges[here] - [rows[0], 0, 0, 0])
        truth, old = np.abs(test.change), test.values
        found[count] = {
            name: {"truth": spearman(new, truth), "original": spearman(new, old[name])}
            for name, new in values.items()
        }
    return found


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


def _batches(images: Images, score: Score, size: int) -> Iterator[tuple[np.ndarray, Array, Score]]:
    """Row numbers, images and score of each batch; the last is padded, to compile only once."""
    size = min(size, len(images))
    _, classes = make_score(score, len(images))
    for start in range(0, len(images), size):
        padded = np.minimum(np.arange(start, start + size), len(images) - 1)
        rows = np.arange(start, min(start + size, len(images)))
        yield rows, jnp.asarray(images[padded]), score if classes is None else classes[padded]


def _at(indicator: Array, edges: np.ndarray) -> np.ndarray:
    image, layer, i, j = edges.T
    return np.asarray(indicator[layer, image, i, j], np.float32)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _keys(image_keys: Keys, batch: int) -> np.ndarray:
    keys = np.arange(batch) if image_keys is None else np.asarray(image_keys)
    if keys.shape != (batch,):
        raise ValueError(f"image_keys have shape {keys.shape}; expected one for each of {batch}")
    return keys


def _check(model: Any, names: Sequence[str], known: Any) -> None:
    if model is not None and not isinstance(model, ViT):
        raise ValueError("faithfulness needs vit_interact's ViT, whose edges can be cut")
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"there is no {missing} here; known: {', '.join(known)}")
