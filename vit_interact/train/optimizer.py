"""optax from a config: rates by layer, what decays, what is frozen."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from vit_interact.models.cpu import on_cpu
from vit_interact.train.sharding import path_of


def make_schedule(config: Any, steps: int, steps_per_epoch: float) -> Callable[[Any], Any]:
    """Learning rate by step: linear rise, then `cosine`, `linear` or `constant`.

    Args:
      config: `config.schedule`.
      steps: of the whole run.
      steps_per_epoch: of `config.warmup`'s unit.

    Raises:
      ValueError: when the rise takes the whole run.
    """
    rise = round(config.warmup * steps_per_epoch)
    if rise >= steps > 1:
        raise ValueError(
            f"config.schedule.warmup={config.warmup} epochs are {rise} of {steps} steps in all"
        )
    rest = max(1, steps - rise)
    if config.kind == "cosine":
        after = optax.cosine_decay_schedule(config.rate, rest, config.final / config.rate)
    elif config.kind == "linear":
        after = optax.linear_schedule(config.rate, config.final, rest)
    else:
        after = optax.constant_schedule(config.rate)
    if not rise:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.rate, rise), after], [rise])


def make_optimizer(
    config: Any, schedule: Callable[[Any], Any], params: Mapping[str, Any], depth: int
) -> optax.GradientTransformation:
    """The whole update rule.

    Frozen parameters have no optimiser state, and XLA drops the computation of their gradients.
    Weight decay is decoupled for all three rules, and scaled like the rest of the update by the
    learning rate, its schedule and the layer's factor.

    Args:
      config: `config.optimizer`.
      schedule: from `make_schedule`.
      params: the parameters, or their shapes.
      depth: blocks of the model.

    Raises:
      ValueError: for a pattern that is no regular expression, matches nothing or freezes all.
    """
    frozen = frozen_leaves(params, config.freeze)
    if all(jax.tree.leaves(frozen)):
        raise ValueError(f"config.optimizer.freeze={config.freeze!r} freezes every parameter")
    rules: list[optax.GradientTransformation] = []
    if config.clip:
        rules.append(_clip_by_norm(config.clip))
    rules.append(
        {
            "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
            "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
            "sgd": lambda: optax.trace(config.momentum, nesterov=True),
        }[config.name]()
    )
    if config.weight_decay:
        spared = matches(params, config.no_decay, "no_decay", must=False)
        decayed = jax.tree.map(lambda no: not no, spared)
        # The partition below hides frozen leaves from the rules, so the mask is asked for late.
        rules.append(
            optax.add_decayed_weights(config.weight_decay, functools.partial(_like, decayed))
        )
    rates = (config.layer_decay, config.head_rate, config.window_rate)
    factors = rate_factors(params, depth, *rates)
    if rates != (1, 1, 1):
        rules.append(_scale_by(factors))
    rules.append(optax.scale_by_learning_rate(schedule))
    rule = optax.chain(*rules)
    if not any(jax.tree.leaves(frozen)):
        return rule
    labels = jax.tree.map(lambda still: "frozen" if still else "trained", frozen)
    return optax.partition({"trained": rule, "frozen": optax.set_to_zero()}, labels)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all leaves together, as `optax.tree.norm`.

    On accelerators, leaves of one shape are squared and added up together: for each by itself a GPU
    needs two kernels, whose start takes longer than they do. A CPU would copy them.
    """
    if on_cpu():
        return optax.tree.norm(tree)
    by_shape: dict[tuple[int, ...], list[Array]] = {}
    for leaf in jax.tree.leaves(tree):
        by_shape.setdefault(leaf.shape, []).append(leaf)
    sums = [jnp.sum(jnp.square(jnp.stack(leaves))) for leaves in by_shape.values()]
    return jnp.sqrt(sum(sums, start=jnp.zeros(())))


def _clip_by_norm(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, by `global_norm`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = global_norm(updates)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda one: one * factor.astype(one.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def frozen_leaves(params: Any, pattern: str) -> Any:
    """Which parameters are frozen: those that match, and windows that are given.

    Raises:
      ValueError: for a pattern that is no regular expression or finds nothing.
    """
    asked = matches(params, pattern, "freeze")
    given = matches(params, r"GivenWindows_0/windows$", "freeze", must=False)
    return jax.tree.map(lambda one, other: one or other, asked, given)


def matches(params: Any, pattern: str, name: str, must: bool = True) -> Any:
    """Which parameters have a path in which the pattern is found; none for an empty one.

    Raises:
      ValueError: for a pattern that is no regular expression or finds nothing.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"config.optimizer.{name}={pattern!r}: {error}") from error
    found = jax.tree_util.tree_map_with_path(
        lambda keys, _: bool(pattern and compiled.search(path_of(keys))), params
    )
    if pattern and must and not any(jax.tree.leaves(found)):
        first = path_of(jax.tree_util.tree_leaves_with_path(params)[0][0])
        raise ValueError(
            f"config.optimizer.{name}={pattern!r} matches no parameter; one is called {first}"
        )
    return found


def rate_factors(params: Any, depth: int, decay: float, head: float, windows: float = 1.0) -> Any:
    """Factor of the learning rate for each parameter.

    Embeddings are layer 0, block `i` is layer `i + 1`, norm and head are layer `depth + 1`; layer
    `l` learns at `decay^(depth + 1 − l)` (Clark et al. 2020, ELECTRA; as in BEiT and MAE). In a
    scanned model the factor is an array over the leading layer axis.
    """

    def factor(keys: Any, leaf: Any) -> float | np.ndarray:
        path = path_of(keys)
        own = windows if "WindowHead_0" in path else 1.0
        if path.startswith(("head", "head_dist")):
            return head
        if found := re.match(r"Transformer/encoderblock_(\d+)/", path):
            return float(own * decay ** (depth - int(found.group(1))))
        if path.startswith("Transformer/encoderblock/"):
            by_layer = own * decay ** np.arange(depth, 0, -1, dtype=np.float32)
            return by_layer.reshape(-1, *(1,) * (len(leaf.shape) - 1))
        if path.startswith(("Transformer/encoder_norm", "pool_norm", "MAPHead_0")):
            return 1.0
        return float(decay ** (depth + 1))

    return jax.tree_util.tree_map_with_path(factor, params)


def _scale_by(factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled = jax.tree.map(
            lambda factor, value: value * jnp.asarray(factor, value.dtype),
            _like(factors, updates),
            updates,
        )
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _like(values: Any, tree: Any) -> Any:
    """Values with optax's masks where the tree has them."""
    masked = optax.MaskedNode
    return jax.tree.map(
        lambda leaf, value: leaf if isinstance(leaf, masked) else value,
        tree,
        values,
        is_leaf=lambda leaf: isinstance(leaf, masked),
    )
