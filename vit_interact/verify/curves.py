"""From predictions of each image to accuracies, areas under curves and bootstrap intervals."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 2000


def resample(images: int, seed: int, resamples: int = RESAMPLES) -> Float[np.ndarray, "S n"]:
    """Weights of a bootstrap over images: how often each is drawn, over how many are drawn."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples) / images


def interval(values: Float[np.ndarray, "*more S"]) -> list[float]:
    """The central 95 % of bootstrap values."""
    return [float(x) for x in np.quantile(values, (0.025, 0.975))]


def share(
    hits: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "S n"]
) -> tuple[float, list[float]]:
    """Mean of hits, and its 95 % interval."""
    return float(hits.mean()), interval(weights @ hits)


def area_under(
    shares: Float[np.ndarray, " Q"], accuracy: Float[np.ndarray, "*more Q"]
) -> Float[np.ndarray, "*more"]:
    """Mean height of an accuracy curve: trapezoids, divided by the width of the range."""
    return np.asarray(np.trapezoid(accuracy, shares, axis=-1) / (shares[-1] - shares[0]))


def removal_auc(
    shares: list[float], correct: Bool[np.ndarray, "Q n"], weights: Float[np.ndarray, "S n"]
) -> tuple[float, list[float]]:
    """Area under accuracy against share removed, and its 95 % interval over images."""
    xs = np.asarray(shares, float)
    samples = area_under(xs, weights @ correct.T)
    return float(area_under(xs, correct.mean(axis=1))), interval(samples)
