"""`vi.measure` and `vi.capture`: a model and images in, indicators or raw tensors out."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_interact.interactions.indicators import (
    Captures,
    check_name,
    roll,
)
from vit_interact.interactions.streaming import Fields
from vit_interact.models.attend import Attended, QueryBlocks, Tiles
from vit_interact.models.attention import Taps, output_gradient
from vit_interact.models.blocks import Layers, map_images
from vit_interact.models.cpu import jit
from vit_interact.models.vit import Images, Keep, LayerMask, ViT
from vit_interact.observe.fields import FieldsOf
from vit_interact.observe.maps import Maps, needs_backward
from vit_interact.observe.probe import (
    Score,
    choose_layers,
    class_score,
    make_score,
    probe,
)
from vit_interact.observe.ways import images_together, query_blocks, tiles

_LOG = logging.getLogger("vit_interact")
_CAPTURE_NEEDS = ("weights", "values", "output", "grad")


@overload
def measure(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str] = ...,
    score: Score = ...,
    layers: Sequence[int] | None = ...,
    keep: Keep = ...,
    mask: LayerMask = ...,
    block: int | None = ...,
    reduce: None = ...,
    coverage: float | Sequence[float] = ...,
    kernel: str | None = ...,
) -> dict[str, Array]: ...


@overload
def measure(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str] = ...,
    score: Score = ...,
    layers: Sequence[int] | None = ...,
    keep: Keep = ...,
    mask: LayerMask = ...,
    block: int | None = ...,
    *,
    reduce: Literal["fields"],
    coverage: float | Sequence[float] = ...,
    kernel: str | None = ...,
) -> dict[str, Fields]: ...


def measure(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str] = ("leave_one_out",),
    score: Score = "predicted",
    layers: Sequence[int] | None = None,
    keep: Keep = None,
    mask: LayerMask = None,
    block: int | None = None,
    reduce: str | None = None,
    coverage: float | Sequence[float] = 0.9,
    kernel: str | None = None,
) -> dict[str, Float[Array, "L B N N"]] | dict[str, Fields]:
    """Measures the impact of every token on every other one, in one compiled call.

    Each layer is reduced to `[B, N, N]` where it is computed; the stack `[L, B, H, N, N]` never
    exists. All indicators that need gradients share one backward pass. On one CPU, some images of
    a large batch are worked on at a time (docs/kernels.md). Traceable under an outer `jit`;
    sharded images give sharded maps.

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
      block: how many queries of a layer our `ViT` works on at a time. None chooses: all at once
        where that takes little memory, and blocks at high resolution, so that not even one layer's
        `[B, H, N, N]` exists; on a CPU of a head or two where indicators are sums over heads
        (docs/kernels.md). Other models work on all at once.
      reduce: `"fields"` reduces each layer on the way to received impact, windows and responsive
        fields, and no map `[B, N, N]` exists either; only those of `rollout`, which mixes layers.
        For our `ViT` with all its patches.
      coverage: of windows, a share of a row or several; only with `reduce="fields"`.
      kernel: `"pallas"` for the Pallas kernels for GPUs and TPUs (docs/kernels.md): our `ViT`, maps
        but for `value_norm`, no `mask` and no predicted windows; a CPU interprets them, slowly.
        `"xla"` for none. None takes them for 16-bit models on one NVIDIA GPU, unless
        `leave_one_out` or `value_norm` is measured.

    Returns:
      Name to `[L, B, N, N]`, entry `i, j` being the impact of token `j` on token `i`; or, with
      `reduce="fields"`, name to `Fields` with leading axes `[L, B]`.

    Raises:
      ValueError: for an unknown indicator, layer, score or reduction, or images that do not fit the
        model.
    """
    if reduce is None:
        return measure_with_logits(
            model, params, images, indicators, score, layers, keep, mask, block, kernel
        )[1]
    if reduce != "fields":
        raise ValueError(f"reduce={reduce!r}: expected None or 'fields'")
    if not isinstance(model, ViT) or keep is not None:
        raise ValueError("reduce='fields' needs vit_interact's ViT and all patches: keep=None")
    if kernel not in (None, "xla"):
        raise ValueError("reduce='fields' has no kernel: kernel=None")
    names, chosen, function, classes = _checked(model, params, images, indicators, score, layers)
    several = isinstance(coverage, Sequence)
    coverages = tuple(coverage) if isinstance(coverage, Sequence) else (coverage,)
    layout = model.config.layout
    together = images_together(model, images.shape[0], None, mask, function)
    blocks = query_blocks(model, together, None, block, names)
    blocks = dataclasses.replace(blocks or QueryBlocks(layout.num_patches), layout=layout)
    fields = FieldsOf(layout, coverages, several)
    task = _Task(names, chosen, function, blocks, together, fields)
    found = _measure(model, params, images, classes, None, mask, task)[1]
    return {name: found[name] for name in names}


def measure_with_logits(
    model: Any,
    params: Mapping[str, Any],
    images: Images,
    indicators: Sequence[str] = ("leave_one_out",),
    score: Score = "predicted",
    layers: Sequence[int] | None = None,
    keep: Keep = None,
    mask: LayerMask = None,
    block: int | None = None,
    kernel: str | None = None,
) -> tuple[Float[Array, "B classes"], dict[str, Float[Array, "L B N N"]]]:
    """`measure`, and the logits of the same pass."""
    names, chosen, function, classes = _checked(model, params, images, indicators, score, layers)
    if not isinstance(model, ViT) and (keep is not None or mask is not None):
        raise ValueError("keep and mask need vit_interact's ViT")
    keep = None if keep is None else jnp.asarray(keep)
    blocks: QueryBlocks | Tiles | None = tiles(model, names, mask, block, kernel)
    together = images_together(model, images.shape[0], keep, mask, function)
    blocks = blocks or query_blocks(model, together, keep, block, names)
    task = _Task(names, chosen, function, blocks, together)
    logits, maps = _measure(model, params, images, classes, keep, mask, task)
    return logits, {name: maps[name] for name in names}  # jit returns names in sorted order


def _checked(
    model: Any, params: Any, images: Any, indicators: Sequence[str], score: Score, layers: Any
) -> tuple[Any, ...]:
    """Names, layers, and the two parts of the score (`make_score`)."""
    names = (indicators,) if isinstance(indicators, str) else tuple(indicators)
    for name in names:
        check_name(name)
    return names, choose_layers(model, params, images, layers), *make_score(score, images.shape[0])


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a program of `_measure` does, whatever its arrays hold: one compilation for each.

    Attributes:
      names: of indicators.
      layers: their numbers.
      score: of logits; None is that of `classes`.
      blocks: how many queries, heads or tiles are worked on at a time.
      together: how many images.
      fields: what each layer is reduced to in place of maps.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    score: Callable[[Array], Array] | None
    blocks: QueryBlocks | Tiles | None
    together: int
    fields: FieldsOf | None = None


@jit(
    batch=lambda model, params, images, *_: (model, images.shape[0]),
    static_argnames=("model", "task"),
)
def _measure(
    model: Any,
    params: Any,
    images: Array,
    classes: Array | None,
    keep: Array | None,
    mask: LayerMask,
    task: _Task,
) -> tuple[Array, dict[str, Any]]:
    """Logits and maps, or fields, of `task.together` images at a time."""

    def some(images: Array, classes: Array | None, keep: Array | None) -> Any:
        return _measure_at_once(model, params, images, classes, keep, mask, task)

    if task.together == images.shape[0]:
        logits, found = some(images, classes, keep)
        return logits, {
            name: _stack(list(made.each)) if isinstance(made, Layers) else made
            for name, made in found.items()
        }
    axis = 1 if task.fields is None else task.fields.image_axes
    axes = (0, dict.fromkeys(task.names, axis))
    return map_images(some, task.together, images, classes, keep, axes=axes)


def _measure_at_once(
    model: Any,
    params: Any,
    images: Array,
    classes: Array | None,
    keep: Array | None,
    mask: LayerMask,
    task: _Task,
) -> tuple[Array, dict[str, Layers | Fields]]:
    """Logits, and maps of each layer or fields, of images that are worked on together."""
    names, layers, fields = task.names, task.layers, task.fields
    backward = tuple(name for name in names if needs_backward(name))
    forward = tuple(name for name in names if name not in backward)
    # A rollout passes through every layer below the ones asked for.
    below = tuple(range(max(layers) + 1)) if "rollout" in names else layers
    reduce: Any
    reduce_grad: Any
    reduce, reduce_grad = (Maps(chosen) if chosen else None for chosen in (forward, backward))
    if fields is not None:
        reduce, reduce_grad = (f and fields.reducing(f) for f in (reduce, reduce_grad))
    graded = reduce is None and fields is None
    taps = Taps(
        layers=below, reduce=reduce, reduce_grad=reduce_grad, blocks=task.blocks, only_graded=graded
    )

    def sinks(attended: Any) -> dict[str, jax.ShapeDtypeStruct]:
        if fields is not None:
            return fields.shapes(backward, attended.weights.shape[0])
        batch, _, *square = attended.weights.shape
        shape = jax.ShapeDtypeStruct((batch, *square), attended.weights.dtype)
        return dict.fromkeys(backward, shape)

    score = task.score or functools.partial(class_score, classes=classes)
    probed = probe(model, params, images, taps, sinks, score, keep, mask)
    positions = [below.index(layer) for layer in layers]
    found: dict[str, Any] = {}
    for name in names:
        source = probed.backward if name in backward else probed.forward
        if fields is not None and name != "rollout":
            found[name] = fields.gather(name, [source[position] for position in positions])
            continue
        per_layer = [layer[name] for layer in source]
        if name == "rollout":
            per_layer = list(roll(_stack(per_layer)))
        asked = tuple(per_layer[position] for position in positions)
        found[name] = Layers(asked) if fields is None else fields.of_map(_stack(list(asked)))
    return probed.logits, found


def _stack(layers: list[Any]) -> Array:
    """`jnp.stack` as updates of one buffer: XLA writes each layer straight into the result.

    A concatenation would hold all layers and the result at once. Maps that a kernel is still to
    make are written by it.
    """
    if not isinstance(layers[0], jax.Array):
        from vit_interact.models.tiled import stack_maps

        return stack_maps(layers)
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
