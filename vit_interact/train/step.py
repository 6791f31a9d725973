"""One training step and one evaluation step: pure functions of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics
from jaxtyping import Array, Float

from vit_interact.data.augment import Augment, augment_images, erase_images, mix_images
from vit_interact.data.preprocess import Preprocess
from vit_interact.models.vit import ViT
from vit_interact.models.winft import predicted_distances, window_layers
from vit_interact.train.evaluate import Evaluation
from vit_interact.train.optimizer import global_norm
from vit_interact.train.state import Running, TrainState, no_metrics
from vit_interact.train.windows import Guide, guidance, renormalized, window_shares

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model whose outputs are learned, too.

    Attributes:
      model: of the same classes and image size.
      params: its parameters.
      preprocess: its normalisation.
      kind: `soft` (its probabilities) or `hard` (its choice).
      weight: of its part of the loss.
      temperature: of soft targets.
    """

    model: ViT
    params: Any
    preprocess: Preprocess
    kind: str
    weight: float
    temperature: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a step needs beside state and batch.

    Attributes:
      model: what is trained.
      optimizer: from `make_optimizer`.
      frozen: tree of which parameters stay as they are.
      augment: transforms; those of single pictures only when `on_device`.
      on_device: whether pictures are augmented here, or were by who read them.
      preprocess: normalisation.
      seed: of all random keys.
      parts: that a batch is computed in, one after the other.
      log_every: steps after which sums for the log begin anew.
      smoothing: of labels.
      loss: `softmax` or `sigmoid`.
      ema: decay of averaged parameters, 0 for none.
      teacher: for distillation.
      guide: teaches predicted windows, or None.
      attend: says which windows are attended within, or None.
      weight: of the guidance loss by step.
      sharpness: of predicted windows by step, or None for that of the model.
    """

    model: ViT
    optimizer: optax.GradientTransformation
    frozen: Any
    augment: Augment
    on_device: bool
    preprocess: Preprocess
    seed: int
    parts: int = 1
    log_every: int = 50
    smoothing: float = 0.0
    loss: str = "softmax"
    ema: float = 0.0
    teacher: Teacher | None = None
    guide: Guide | None = None
    attend: Guide | None = None
    weight: Callable[[Any], Any] = lambda step: 0.0
    sharpness: Callable[[Any], Any] | None = None

    def nothing(self) -> Running:
        """Sums before the first step."""
        return no_metrics(len(window_layers(self.model)), self.guide is not None)


def make_train_step(recipe: Recipe) -> Callable[..., tuple[TrainState, Running]]:
    """The step `(state, batch, store, teaching) -> (state, sums for the log)`.

    `store` is an array of all pictures on the device, uint8 `[n, h, w, 3]`, or None when they come
    with the batch; `teaching` the parameters of the teachers, under `classes` and `windows`.
    """
    predicts = bool(window_layers(recipe.model))

    def train_step(
        state: TrainState, batch: Batch, store: Any = None, teaching: Any = None
    ) -> tuple[TrainState, Running]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed), state.step), 4)
        images, targets = _prepare(recipe, batch, store, keys)
        count = jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), 1.0)

        sharpness = None if recipe.sharpness is None else recipe.sharpness(state.step)

        def part_loss(params: Any, part: tuple[Array, Array, Array]) -> tuple[Array, Any]:
            images, targets, number = part
            params = jax.tree.map(
                lambda leaf, still: jax.lax.stop_gradient(leaf) if still else leaf,
                params,
                recipe.frozen,
            )
            dropout = {"dropout": jax.random.fold_in(keys[3], number)}
            settings: dict[str, Any] = {"train": True, "rngs": dropout}
            share = targets[:, -1]
            windows: dict[str, Array] = {}
            found: Any
            if predicts:
                found, distances = predicted_distances(
                    recipe.model, params, images, sharpness=sharpness, **settings
                )
                windows = _about_windows(recipe, params, teaching, images, distances, share / count)
            else:
                mask = _masks(recipe.attend, recipe.model, recipe.preprocess, teaching, images)
                found = recipe.model.apply({"params": params}, images, mask=mask, **settings)
            logits = found.astype(jnp.float32)
            loss = jnp.sum(_losses(recipe, logits, targets, images, teaching)) / count
            right = jnp.argmax(logits, -1) == jnp.argmax(targets[:, :-1], -1)
            accuracy = jnp.sum(right * share) / count
            total = loss + recipe.weight(state.step) * windows.get("guidance", 0.0)
            return total, {"loss": loss, "accuracy": accuracy, "windows": windows}

        grad_of = jax.grad(part_loss, has_aux=True)
        if recipe.parts == 1:
            grads, figures = grad_of(state.params, (images, targets, jnp.zeros((), int)))
        else:
            grads, figures = _in_parts(grad_of, state.params, images, targets, recipe.parts)
        updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # The average of few steps would remember the random start: the decay grows to its
            # value (as in TensorFlow's ExponentialMovingAverage).
            done = state.step.astype(jnp.float32)
            decay = jnp.minimum(recipe.ema, (1 + done) / (10 + done))
            ema = optax.incremental_update(params, ema, 1 - decay)
        one = jnp.ones((), jnp.float32)
        here = Running(
            loss=metrics.Average(total=figures["loss"] * count, count=count),
            accuracy=metrics.Average(total=figures["accuracy"] * count, count=count),
            grad_norm=metrics.Average(total=global_norm(grads), count=one),
            unread=metrics.Average(
                total=jnp.sum(1.0 - batch["mask"].astype(jnp.float32)), count=one
            ),
            windows={
                name: metrics.Average(total=value * count, count=count)
                for name, value in figures["windows"].items()
            },
        )
        before = jax.tree.map(
            lambda kept, none: jnp.where(state.step % recipe.log_every == 0, none, kept),
            state.running,
            recipe.nothing(),
        )
        running = before.merge(here)
        state = TrainState(state.step + 1, params, opt_state, ema, running)
        return state, running

    return train_step


def _prepare(
    recipe: Recipe, batch: Batch, store: Any, keys: Array
) -> tuple[Float[Array, "B h w 3"], Float[Array, "B targets"]]:
    """Normalised images and their targets; the targets' last column is how much of one counts."""
    plan, size = recipe.augment, recipe.model.config.image_size
    pixels = batch["pictures"] if store is None else store[batch["indices"]]
    if recipe.on_device:
        pixels = augment_images(keys[0], pixels, batch["sizes"], plan, size)
    images = recipe.preprocess.normalize(pixels)
    mask = batch["mask"].astype(jnp.float32)[:, None]
    classes = recipe.model.config.num_classes
    # An empty place has no target; mixed with a photograph, the photograph's share counts.
    targets = jnp.concatenate([jax.nn.one_hot(batch["labels"], classes) * mask, mask], axis=-1)
    images = erase_images(keys[1], images, plan)
    images, targets = mix_images(keys[2], images, targets, plan)
    return images, targets


def _losses(
    recipe: Recipe,
    logits: Float[Array, "B classes"],
    targets: Float[Array, "B targets"],
    images: Float[Array, "B h w 3"],
    teaching: Any,
) -> Float[Array, " B"]:
    """Loss of each image, 0 for empty places."""
    targets, share = targets[:, :-1], targets[:, -1]
    classes = logits.shape[-1]
    smooth = targets * (1 - recipe.smoothing) + recipe.smoothing * share[:, None] / classes
    if recipe.loss == "softmax":
        losses = -jnp.sum(smooth * jax.nn.log_softmax(logits), axis=-1)
    else:
        losses = share * jnp.sum(optax.sigmoid_binary_cross_entropy(logits, smooth), axis=-1)
    teacher = recipe.teacher
    if teacher is None:
        return losses
    taught: Any = teacher.model.apply(
        {"params": _of(teaching, "classes")},
        renormalized(images, recipe.preprocess, teacher.preprocess),
    )
    taught = jax.lax.stop_gradient(taught.astype(jnp.float32))
    if teacher.kind == "hard":
        lesson = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(taught, -1))
    else:
        # The square keeps the gradient's size when the temperature rises (Hinton et al. 2015).
        heat = teacher.temperature
        lesson = heat**2 * optax.kl_divergence(
            jax.nn.log_softmax(logits / heat), jax.nn.softmax(taught / heat)
        )
    return (1 - teacher.weight) * losses + teacher.weight * share * lesson


def _about_windows(
    recipe: Recipe,
    params: Any,
    teaching: Any,
    images: Float[Array, "B h w 3"],
    distances: Float[Array, "L B G P 4"],
    shares: Float[Array, " B"],
) -> dict[str, Array]:
    """Area by layer, and with a guide its loss and the mean IoU with its windows."""
    layout, guide = recipe.model.config.layout, recipe.guide
    found = {"area": jnp.sum(window_shares(distances, layout) * shares[:, None], axis=0)}
    if guide is None:
        return found
    still = jax.lax.stop_gradient(params)
    goal = guide.windows(
        recipe.model, still, _of(teaching, "windows"), guide.chosen(images), recipe.preprocess
    )
    few = jnp.moveaxis(guide.chosen(jnp.moveaxis(distances, 1, 0)), 0, 1)
    losses, shared = guidance(few, *goal, layout)
    shares = guide.chosen(shares) * guide.every
    return {**found, "guidance": jnp.sum(losses * shares), "iou": jnp.sum(shared * shares)}


def _masks(
    attend: Guide | None, model: ViT, preprocess: Preprocess, teaching: Any, images: Array
) -> list[Any] | None:
    """Masks of the windows that a teacher draws for each image, or None."""
    if attend is None:
        return None
    windows, _ = attend.windows(model, None, teaching["windows"], images, preprocess)
    return attend.masks(model, windows)


def _of(teaching: Any, name: str) -> Any:
    return None if teaching is None else teaching.get(name)


def _in_parts(
    grad_of: Callable[..., Any], params: Any, images: Array, targets: Array, parts: int
) -> tuple[Any, Any]:
    """Gradient and figures of a batch, computed a part at a time.

    Every part takes images from all over the batch, so that each device keeps its own.
    """

    def split(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, grad_of(params, part)), None

    parts_of = (split(images), split(targets), jnp.arange(parts))
    shapes = jax.eval_shape(grad_of, params, jax.tree.map(lambda array: array[0], parts_of))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(add, start, parts_of)
    return sums


def make_eval_step(
    model: ViT, preprocess: Preprocess, attend: Guide | None = None
) -> Callable[..., Evaluation]:
    """The step `(parameters, batch, sharpness, teaching) -> sums of this batch`."""

    def eval_step(
        params: Any, batch: Batch, sharpness: Any = None, teaching: Any = None
    ) -> Evaluation:
        images = preprocess.normalize(batch["pictures"])
        mask = _masks(attend, model, preprocess, teaching, images)
        logits: Any = model.apply({"params": params}, images, mask=mask, sharpness=sharpness)
        return Evaluation.of(logits.astype(jnp.float32), batch["labels"], batch["mask"])

    return eval_step
