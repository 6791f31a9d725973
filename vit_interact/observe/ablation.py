"""Ground truth for indicators: edges that are really cut, in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_interact.models.attention import Taps
from vit_interact.models.vit import Block, Images, ViT
from vit_interact.observe.probe import Score, class_score, make_score


def ablate_edges(
    model: ViT,
    params: Mapping[str, Any],
    images: Images,
    edges: Array | np.ndarray,
    score: Score = "predicted",
    batch_size: int = 32,
) -> Float[np.ndarray, " E"]:
    """Change of the score when single edges are masked and the model runs on from that layer.

    Everything is float64: in float32 the change of most edges is rounding noise. One program is
    compiled, whatever the layers of the edges.

    Args:
      model: our `ViT`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`.
      edges: int `[E, 4]`: image, layer, `i`, `j`; token `i` no longer attends to token `j`, in all
        heads of that layer.
      score: as for `vi.measure`; `predicted` is the class predicted without any cut.
      batch_size: edges at a time; memory grows with it.

    Returns:
      Score with the edge cut minus score without, float64 `[E]`, in units of the score.

    Raises:
      ValueError: for edges out of range, or a model that is not our `ViT`.
    """
    if not isinstance(model, ViT):
        raise ValueError(
            "ablate_edges reruns a model from any layer, which needs vit_interact's ViT"
        )
    config = model.config
    edges = np.asarray(edges)
    limits = (len(images), config.depth, config.layout.num_tokens, config.layout.num_tokens)
    if edges.ndim != 2 or edges.shape[1] != 4 or not np.issubdtype(edges.dtype, np.integer):
        raise ValueError(
            f"edges have shape {edges.shape} and type {edges.dtype}; expected int [E, 4]"
        )
    if len(edges) and ((edges < 0).any() or (edges >= limits).any()):
        bad = edges[((edges < 0) | (edges >= limits)).any(axis=1)][0]
        raise ValueError(f"edge {bad.tolist()} is outside of (image, layer, i, j) < {limits}")

    function, classes = make_score(score, len(images))
    exact = ViT(dataclasses.replace(config, dtype="float64", scan=False, remat=False))
    with jax.enable_x64(True):
        outside, blocks = _split_params(params, config)
        pictures = jnp.asarray(np.asarray(images, np.float64))
        hidden, base_logits = _run(exact, outside, blocks, pictures)
        if function is None and classes is None:
            classes = jnp.argmax(base_logits, axis=-1)
        base = _score(function, base_logits, classes)
        changes = np.zeros(len(edges))
        # Edges of one layer run together; a short chunk is padded with copies of its first edge.
        for layer in np.unique(edges[:, 1]) if len(edges) else ():
            rows = np.flatnonzero(edges[:, 1] == layer)
            for start in range(0, len(rows), batch_size):
                chunk = rows[start : start + batch_size]
                padded = np.concatenate([chunk, np.repeat(chunk[:1], batch_size - len(chunk))])
                image, _, i, j = edges[padded].T
                logits = _run_cut(exact, outside, blocks, hidden, int(layer), image, i, j)
                own = None if classes is None else classes[image]
                change = _score(function, logits, own) - base[image]
                changes[chunk] = np.asarray(change)[: len(chunk)]
    return changes


def _score(function: Any, logits: Array, classes: Array | None) -> Array:
    return class_score(logits, classes) if function is None else function(logits)


def _split_params(params: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], Any]:
    """float64 parameters: all but the blocks, and the blocks stacked on a layer axis."""
    wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), dict(params))
    transformer = dict(wide.pop("Transformer"))
    if config.scan:
        blocks = transformer.pop("encoderblock")
    else:
        layers = [transformer.pop(f"encoderblock_{i}") for i in range(config.depth)]
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**wide, "Transformer": transformer}, blocks


def _block(model: ViT, blocks: Any, layer: Any, x: Array, mask: Array | None) -> Array:
    params = jax.tree.map(lambda leaf: leaf[layer], blocks)
    # Empty taps choose the explicit path: the fused one rounds its softmax to float32.
    block = Block(model.config, taps=Taps())
    return block.apply({"params": params}, x, mask, None, 0.0, False)[0]


def _finish(model: ViT, outside: Any, x: Array) -> Array:
    """The final norm and the head; `run_blocks` from behind the last block is the norm alone."""
    variables = {"params": outside}
    apply: Any = model.apply
    x = apply(variables, x, first=model.config.depth, method=ViT.run_blocks)
    return apply(variables, x, method=ViT.classify)


@functools.partial(jax.jit, static_argnames="model")
def _run(model: ViT, outside: Any, blocks: Any, images: Array) -> tuple[Array, Array]:
    """What each block reads, `[L, B, N, D]`, and the logits."""
    apply: Any = model.apply
    x = apply({"params": outside}, images, method=ViT.embed)

    def step(x: Array, layer: Array) -> tuple[Array, Array]:
        return _block(model, blocks, layer, x, None), x

    x, hidden = jax.lax.scan(step, x, jnp.arange(model.config.depth))
    return hidden, _finish(model, outside, x)


@functools.partial(jax.jit, static_argnames="model")
def _run_cut(
    model: ViT,
    outside: Any,
    blocks: Any,
    hidden: Array,
    first: Array | int,
    image: Array,
    i: Array,
    j: Array,
) -> Array:
    """Logits `[E, classes]` with edge `(i, j)` cut in layer `first` of image `image`."""
    tokens = hidden.shape[2]
    edge = jnp.zeros((len(image), tokens, tokens), bool)
    edge = edge.at[jnp.arange(len(image)), i, j].set(True)

    def step(layer: Array, x: Array) -> Array:
        return _block(model, blocks, layer, x, ~(edge & (layer == first)))

    x = jax.lax.fori_loop(first, model.config.depth, step, hidden[first, image])
    return _finish(model, outside, x)
