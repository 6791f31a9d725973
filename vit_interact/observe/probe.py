"""Runs a model with taps and reads what its attention layers gave away.

Two kinds of model are probed. Our `ViT` reduces inside each layer (`Taps.reduce`), so large
tensors die young. Any other linen model whose attention uses `vit_interact.attention_fn` sows raw
tensors, and the same reductions run right after, inside the same compiled program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from vit_interact.models.attend import Attended
from vit_interact.models.attention import KINDS, PREFIX, SINKS, Taps
from vit_interact.models.vit import ViT

Score = str | int | Array | np.ndarray | Callable[[Array], Array]
Path = tuple[str, ...]

_ATTENTION = "MultiHeadDotProductAttention_0"


class Probed(NamedTuple):
    """What a probed run gave.

    Attributes:
      logits: `[B, classes]`.
      forward: for each chosen layer, what `reduce` and `kinds` asked for.
      backward: for each chosen layer, what `reduce_grad` returned; empty without it.
    """

    logits: Array
    forward: list[dict[str, Any]]
    backward: list[dict[str, Array]]


def probe(
    model: Any,
    params: Mapping[str, Any],
    images: Array,
    taps: Taps,
    sinks: Callable[[Any], Mapping[str, Any]],
    score: Callable[[Array], Array],
    keep: Array | None = None,
    mask: Any = None,
    sharpness: Any = None,
) -> Probed:
    """Runs the model once (and once backward if `taps.reduce_grad` is set); traceable.

    Args:
      model: our `ViT`, another linen module with `attention_fn`, or its `apply` function.
      params: the model's parameters.
      images: `[B, h, w, 3]`.
      taps: what to give away; `taps.layers` chooses layers.
      sinks: maps one layer's `Attended` shapes to the shapes that `taps.reduce_grad` returns.
      score: maps logits `[B, classes]` to a score for each image `[B]`.
      keep: patches that stay `[B, K]`, for our `ViT` only; None keeps all.
      mask: True = attend, as our `ViT` takes it; None masks nothing.
      sharpness: of the predicted windows of our `ViT`; None is that of its config.
    """
    if isinstance(model, ViT):
        given = {"keep": keep, "mask": mask, "sharpness": sharpness}
        return _probe_ours(model, params, images, taps, sinks, score, given)
    return _probe_foreign(model, params, images, taps, sinks, score)


def count_layers(model: Any, params: Mapping[str, Any], images: Any) -> int:
    """Number of attention layers that can be probed."""
    if isinstance(model, ViT):
        return model.config.depth
    return len(_foreign_layers(model, params, images))


def choose_layers(
    model: Any, params: Mapping[str, Any], images: Any, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Layer numbers from 0, negative ones counted from the end; None is all.

    Raises:
      ValueError: for a layer that the model does not have, or an empty or repeated choice.
    """
    depth = count_layers(model, params, images)
    if layers is None:
        return tuple(range(depth))
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong:
        raise ValueError(f"layers {wrong}: the model has layers 0 to {depth - 1}")
    chosen = tuple(sorted({layer % depth for layer in layers}))
    if len(chosen) != len(layers) or not chosen:
        raise ValueError(f"layers={list(layers)}: name at least one layer, each one once")
    return chosen


def make_score(score: Score, batch: int) -> tuple[Callable[[Array], Array] | None, Array | None]:
    """Splits a score option into (function, None) or (None, class of each image or None).

    Class numbers stay arrays, so that another class does not compile again. Both None stands for
    the predicted class.

    Raises:
      ValueError: for an unknown option or a wrong number of classes.
    """
    if callable(score):
        return score, None
    if isinstance(score, str):
        if score != "predicted":
            raise ValueError(
                f"score={score!r}: expected 'predicted', a class number, one class number for "
                "each image, or a function of the logits"
            )
        return None, None
    classes = jnp.asarray(score)
    if not jnp.issubdtype(classes.dtype, jnp.integer) or classes.shape not in ((), (batch,)):
        raise ValueError(
            f"score has shape {classes.shape} and type {classes.dtype}; expected a class number or "
            f"integers [{batch}], one for each image"
        )
    return None, jnp.broadcast_to(classes.astype(jnp.int32), (batch,))


def class_score(logits: Array, classes: Array | None) -> Array:
    """The logit of `classes`, or of the predicted class when None; `[B]`."""
    if classes is None:
        classes = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
    return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]


def _backward(
    run: Callable[[Any], tuple[Array, Any]], sinks: Any, score: Callable[[Array], Array]
) -> tuple[Array, Any, Any]:
    """Logits, what was sown, and the cotangents of the sinks; images do not mix in the sum."""

    def total(sinks: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, state = run(sinks)
        scores = score(logits)
        if scores.shape != logits.shape[:1]:
            raise ValueError(
                f"score returned shape {scores.shape}; expected one number for each of "
                f"{logits.shape[0]} images"
            )
        wide = jnp.promote_types(scores.dtype, jnp.float32)
        return jnp.sum(scores.astype(wide)), (logits, state)

    cotangents, (logits, state) = jax.grad(total, has_aux=True)(sinks)
    return logits, state, cotangents


def _probe_ours(
    model: ViT,
    params: Any,
    images: Array,
    taps: Taps,
    sinks: Any,
    score: Any,
    given: dict[str, Any],
) -> Probed:
    config, keep = model.config, given["keep"]
    tokens = config.layout.num_tokens if keep is None else config.prefix + keep.shape[1]
    model = model.clone(taps=taps)
    layers = range(config.depth) if taps.layers is None else taps.layers

    def run(sink_tree: Any) -> tuple[Array, Any]:
        variables = {"params": params, SINKS: sink_tree}
        return model.apply(variables, images, **given, mutable=["intermediates"])

    def read(tree: Any, layer: int) -> Any:
        block = "encoderblock" if config.scan else f"encoderblock_{layer}"
        inside = tree["Transformer"][block][_ATTENTION]
        return jax.tree.map(lambda leaf: leaf[layer], inside) if config.scan else inside

    if taps.reduce_grad is None:
        logits, state = run({})
        cotangents = None
    else:
        shapes = sinks(_attended_shapes(config, len(images), tokens))
        lead = (config.depth,) if config.scan else ()
        zeros = {k: jnp.zeros(lead + s.shape, s.dtype) for k, s in shapes.items()}
        names = ["encoderblock"] if config.scan else [f"encoderblock_{i}" for i in layers]
        tree = {"Transformer": {name: {_ATTENTION: {"attention": zeros}} for name in names}}
        logits, state, cotangents = _backward(run, tree, score)

    sown = state.get("intermediates", {})
    has_forward = bool(taps.kinds or taps.reduce)
    return Probed(
        logits,
        [_unprefixed(read(sown, i)) for i in layers] if has_forward else [],
        [] if cotangents is None else [read(cotangents, i)["attention"] for i in layers],
    )


def _attended_shapes(config: Any, batch: int, tokens: int) -> Any:
    dtype = jnp.dtype(config.dtype)
    per_head: Any = jax.ShapeDtypeStruct((batch, tokens, config.heads, config.head_dim), dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    square: Any = jax.ShapeDtypeStruct((batch, config.heads, tokens, tokens), wide)
    return Attended(per_head, per_head, per_head, square, square, per_head, None)


def _unprefixed(sown: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(PREFIX): value[0] for name, value in sown.items()}


def _apply(model: Any) -> Callable[..., Any]:
    return model.apply if isinstance(model, nn.Module) else model


def _foreign_layers(model: Any, params: Any, images: Any) -> dict[Path, Attended]:
    """Shapes of what each `attention_fn` of the model sows, in order of depth, by path."""
    shapes = jax.eval_shape(
        lambda p, x: _apply(model)({"params": p}, x, mutable=["intermediates"])[1], params, images
    )
    sites = _sites(shapes.get("intermediates", {}))
    if not sites:
        raise ValueError(
            "no attention weights can be captured from this model: build its attention with "
            "nn.MultiHeadDotProductAttention(attention_fn=vit_interact.attention_fn), "
            "outside of nn.scan"
        )
    return sites


def _sites(intermediates: Any) -> dict[Path, Attended]:
    found: dict[Path, dict[str, Any]] = {}
    for path, value in traverse_util.flatten_dict(intermediates).items():
        if path[-1].startswith(PREFIX):
            found.setdefault(path[:-1], {})[path[-1].removeprefix(PREFIX)] = value[0]
    whole = {path: sown for path, sown in found.items() if set(sown) >= set(KINDS)}
    return {path: Attended(**whole[path], out_kernel=None) for path in sorted(whole, key=_natural)}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts block_10 after block_2."""
    pieces = re.split(r"(\d+)", "/".join(path))
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _out_kernel(params: Any, path: Path) -> Array | None:
    """The output kernel `[H, K, D]` of the attention module that holds the tap at `path`."""
    for name in path[:-1]:
        params = params.get(name, {})
    return params.get("out", {}).get("kernel")


def _probe_foreign(
    model: Any, params: Any, images: Array, taps: Taps, sinks: Any, score: Any
) -> Probed:
    del sinks  # the raw gradient is taken and reduced below
    shapes = _foreign_layers(model, params, images)
    paths = list(shapes)
    if taps.layers is not None:
        paths = [paths[layer] for layer in taps.layers]

    def run(sink_tree: Any) -> tuple[Array, Any]:
        variables = {"params": params, SINKS: sink_tree}
        return _apply(model)(variables, images, mutable=["intermediates"])

    if taps.reduce_grad is None:
        logits, state = run({})
        grads: list[Array] = []
    else:
        flat = {}
        for path in paths:
            like = shapes[path].output
            flat[(*path, "attention", "grad")] = jnp.zeros(like.shape, like.dtype)
        tree = traverse_util.unflatten_dict(flat)
        logits, state, cotangents = _backward(run, tree, score)
        flat = traverse_util.flatten_dict(cotangents)
        grads = [flat[(*path, "attention", "grad")] for path in paths]

    sites = _sites(state["intermediates"])
    attended = [sites[path]._replace(out_kernel=_out_kernel(params, path)) for path in paths]
    forward = []
    for layer in attended:
        sown = {kind: getattr(layer, kind) for kind in taps.kinds}
        forward.append({**sown, **(taps.reduce(layer) if taps.reduce else {})})
    backward = [taps.reduce_grad(a, g) for a, g in zip(attended, grads, strict=False)]  # type: ignore[misc]
    return Probed(logits, forward if taps.kinds or taps.reduce else [], backward)
