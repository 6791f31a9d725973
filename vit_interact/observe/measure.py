"""`vi.measure` and `vi.capture`: a model and images in, indicators or raw tensors out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_interact.interactions.indicators import INDICATORS, NEEDS, Captures, check_name, roll
from vit_interact.models.attention import Attended, Taps, output_gradient
from vit_interact.models.vit import Images, Keep, LayerMask, ViT
from vit_interact.observe.probe import (
    Probed,
    Score,
    choose_layers,
    class_score,
    make_score,
    probe,
)

_LOG = logging.getLogger("vit_interact")
_CAPTURE_NEEDS = ("weights", "values", "output", "grad")


def measure(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str] = ("leave_one_out",),
    score: Score = "predicted",
    layers: Sequence[int] | None = None,
    keep: Keep = None,
    mask: LayerMask = None,
) -> dict[str, Float[Array, "L B N N"]]:
    """Measures the impact of every token on every other one, in one compiled call.

    Each layer is reduced to `[B, N, N]` where it is computed; the stack `[L, B, H, N, N]` never
    exists. All indicators that need gradients share one backward pass. Traceable under an outer
    `jit`; sharded images give sharded maps.

    Args:
      model: our `ViT`; or any linen module whose attention uses `vi.attention_fn`; or the `apply`
        function of one, such as `functools.partial(model.apply, train=False)`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`.
      indicators: names of `interactions.INDICATORS`.
      score: what gradients are of: the logit of the predicted class, of one class number, of one
        class number for each image `[B]`, or a function of logits `[B, classes]` giving `[B]`.
      layers: layer numbers, negative ones from the end; None is all.
      keep: patches that stay, as for our `ViT`; tokens are then the prefix and these.
      mask: what may attend to what, as for our `ViT`: the model so restricted is measured.

    Returns:
      Name to `[L, B, N, N]`, entry `i, j` being the impact of token `j` on token `i`.

    Raises:
      ValueError: for an unknown indicator, layer or score, or images that do not fit the model.
    """
    return measure_with_logits(model, params, images, indicators, score, layers, keep, mask)[1]


def measure_with_logits(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str] = ("leave_one_out",),
    score: Score = "predicted",
    layers: Sequence[int] | None = None,
    keep: Keep = None,
    mask: LayerMask = None,
) -> tuple[Float[Array, "B classes"], dict[str, Float[Array, "L B N N"]]]:
    """`measure`, and the logits of the same pass."""
    names = (indicators,) if isinstance(indicators, str) else tuple(indicators)
    for name in names:
        check_name(name)
    chosen = choose_layers(model, params, images, layers)
    function, classes = make_score(score, images.shape[0])
    if not isinstance(model, ViT) and (keep is not None or mask is not None):
        raise ValueError("keep and mask need vit_interact's ViT")
    keep = None if keep is None else jnp.asarray(keep)
    logits, maps = _measure(model, params, images, classes, names, chosen, function, keep, mask)
    return logits, {name: maps[name] for name in names}  # jit returns names in sorted order


@functools.partial(jax.jit, static_argnames=("model", "names", "layers", "score"))
def _measure(
    model: Any,
    params: Any,
    images: Array,
    classes: Array | None,
    names: tuple[str, ...],
    layers: tuple[int, ...],
    score: Callable[[Array], Array] | None,
    keep: Array | None,
    mask: LayerMask,
) -> tuple[Array, dict[str, Array]]:
    backward = tuple(name for name in names if "output_grad" in NEEDS[name])
    forward = tuple(name for name in names if name not in backward)
    # A rollout passes through every layer below the ones asked for.
    below = tuple(range(max(layers) + 1)) if "rollout" in names else layers
    taps = Taps(
        layers=below,
        reduce=functools.partial(reduce_forward, forward) if forward else None,
        reduce_grad=functools.partial(reduce_backward, backward) if backward else None,
    )

    def sinks(attended: Any) -> dict[str, jax.ShapeDtypeStruct]:
        batch, _, *square = attended.weights.shape
        shape = jax.ShapeDtypeStruct((batch, *square), attended.weights.dtype)
        return dict.fromkeys(backward, shape)

    score = score or functools.partial(class_score, classes=classes)
    probed = probe(model, params, images, taps, sinks, score, keep, mask)
    positions = [below.index(layer) for layer in layers]
    maps = {}
    for name in names:
        per_layer = [layer[name] for layer in _source(name, probed)]
        if name == "rollout":
            per_layer = list(roll(jnp.stack(per_layer)))
        maps[name] = _stack_in_place([per_layer[position] for position in positions])
    return probed.logits, maps


def _source(name: str, probed: Probed) -> list[dict[str, Array]]:
    return probed.backward if "output_grad" in NEEDS[name] else probed.forward


def reduce_forward(names: tuple[str, ...], attended: Attended) -> dict[str, Array]:
    """Forward indicators of one layer; `rollout` contributes the layer's mean attention."""
    return {
        name: _evaluate("attention" if name == "rollout" else name, attended, None)
        for name in names
    }


def reduce_backward(names: tuple[str, ...], attended: Attended, g: Array) -> dict[str, Array]:
    """Indicators of one layer that need the gradient of its output."""
    return {name: _evaluate(name, attended, g) for name in names}


def _evaluate(name: str, attended: Attended, g: Array | None) -> Array:
    tensors = {
        "weights": attended.weights,
        "values": attended.values,
        "out_kernel": attended.out_kernel,
        "output_grad": g,
    }
    for need in NEEDS[name]:
        if tensors[need] is None:
            raise ValueError(f"{name} needs {need}, which this model's attention does not expose")
    return INDICATORS[name](*(tensors[need] for need in NEEDS[name]))


def _stack_in_place(layers: list[Array]) -> Array:
    """`jnp.stack` as updates of one buffer: XLA writes each layer straight into the result.

    A concatenation would hold all layers and the result at once.
    """
    stacked = jnp.zeros((len(layers), *layers[0].shape), layers[0].dtype)
    for index, layer in enumerate(layers):
        stacked = stacked.at[index].set(layer)
    return stacked


def capture(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    score: Score = "predicted",
    need: Sequence[str] = _CAPTURE_NEEDS,
    layers: Sequence[int] | None = None,
) -> Captures:
    """Raw tensors of attention layers, for study; `measure` is what scales.

    The size is logged before anything runs (logger `vit_interact`), as a warning above 1 GiB.

    Args:
      model: as for `measure`.
      params: its parameters.
      images: normalised images `[B, h, w, 3]`.
      score: as for `measure`; only used for `grad`.
      need: any of `weights`, `values`, `output`, `grad`.
      layers: layer numbers; None is all.

    Returns:
      `Captures` with a leading layer axis; what was not asked for is None. `out_kernel` is always
      there unless the model hides it.

    Raises:
      ValueError: for an unknown need, layer or score.
    """
    unknown = sorted(set(need) - set(_CAPTURE_NEEDS))
    if unknown:
        raise ValueError(f"cannot capture {unknown}; known: {', '.join(_CAPTURE_NEEDS)}")
    chosen = choose_layers(model, params, images, layers)
    function, classes = make_score(score, images.shape[0])
    arguments = (model, params, images, classes, tuple(need), chosen, function)
    shapes = jax.eval_shape(
        lambda p, x, c: _capture(model, p, x, c, *arguments[4:]), *arguments[1:4]
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    level = logging.WARNING if size > 2**30 else logging.INFO
    _LOG.log(level, "capture holds %.1f MiB; vi.measure reduces layer by layer", size / 2**20)
    return _capture(*arguments)


@functools.partial(jax.jit, static_argnames=("model", "need", "layers", "score"))
def _capture(
    model: Any,
    params: Any,
    images: Array,
    classes: Array | None,
    need: tuple[str, ...],
    layers: tuple[int, ...],
    score: Callable[[Array], Array] | None,
) -> Captures:
    kinds = tuple(kind for kind in need if kind != "grad")
    taps = Taps(
        kinds=kinds,
        layers=layers,
        reduce=_out_kernel_only,
        reduce_grad=output_gradient if "grad" in need else None,
    )
    score = score or functools.partial(class_score, classes=classes)

    def sinks(attended: Any) -> dict[str, Any]:
        return {"grad": attended.output}

    probed = probe(model, params, images, taps, sinks, score)
    tensors = {
        name: jnp.stack([layer[name] for layer in probed.forward]) for name in probed.forward[0]
    }
    if probed.backward:
        tensors["output_grad"] = jnp.stack([layer["grad"] for layer in probed.backward])
    return Captures(**tensors)


def _out_kernel_only(attended: Attended) -> dict[str, Array]:
    return {} if attended.out_kernel is None else {"out_kernel": attended.out_kernel}
