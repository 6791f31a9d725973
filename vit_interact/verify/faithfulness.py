"""The faithfulness test of `vit-interact verify`: its parts, and figures from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import ViT
from vit_interact.observe.measure import measure
from vit_interact.verify import curves, groups
from vit_interact.verify.edges import EdgeTest, edge_test, rank_agreement, reaching_queries
from vit_interact.verify.sanity import redrawn_values, sanity_agreement

PER_LAYER = 4
Row = dict[str, Any]


def run_edges(
    model: ViT,
    params: Mapping[str, Any],
    images: Array,
    keys: Int[np.ndarray, " B"],
    indicators: Sequence[str],
    seed: int,
    count: int,
) -> dict[str, np.ndarray]:
    """Cuts edges of a batch, and measures them again with redrawn weights.

    Args:
      model: our `ViT`.
      params: its parameters.
      images: normalised `[B, h, w, 3]`.
      keys: each image's place in the order of the data.
      indicators: names.
      seed: of edges and of redrawn weights.
      count: images that are not padding; edges of others are left out.

    Returns:
      Arrays whose last axis is that of edges; `edges[0]` holds keys of images.
    """
    size = len(images)
    test = edge_test(model, params, images, indicators, PER_LAYER, seed, keys)
    redrawn = redrawn_values(model, params, images, test, indicators, seed, batch_size=size)
    real = test.edges[:, 0] < count
    edges = test.edges.copy()
    edges[:, 0] = np.asarray(keys)[edges[:, 0]]
    return {
        "edges": edges[real].T,
        "change": test.change[real],
        "values": np.stack([test.values[name][real] for name in indicators]),
        "redrawn": redrawn[..., real],
    }


def run_groups(
    model: ViT,
    params: Mapping[str, Any],
    images: Array,
    keys: Int[np.ndarray, " B"],
    indicator: str,
    seed: int,
) -> dict[str, np.ndarray]:
    """Masks groups of edges; arrays whose last axis is that of images."""
    maps = measure(model, params, images, (indicator,))[indicator]
    test = groups.group_test(model, params, images, maps, seed=seed, image_keys=keys)
    found = {"unmasked": test.unmasked}
    for kind, share in test.change:
        found[f"{kind}/{share}/change"] = test.change[kind, share]
        found[f"{kind}/{share}/predictions"] = test.predictions[kind, share]
    return found


def collect_edges(
    arrays: Mapping[str, np.ndarray], indicators: Sequence[str], config: ViTConfig, seed: int
) -> tuple[list[Row], list[Row]]:
    """Rank agreement with really cut edges, and the same with redrawn weights, as rows.

    Args:
      arrays: of `run_edges`, all batches joined.
      indicators: names, as they were run.
      config: the model's.
      seed: of the bootstrap.
    """
    edges = arrays["edges"].T
    named = dict(zip(indicators, arrays["values"], strict=True))
    images = len(np.unique(edges[:, 0]))
    unread = images * int((~reaching_queries(config)).sum())
    test = EdgeTest(edges, arrays["change"], named, unread, None)
    rows = []
    for name in indicators:
        found = rank_agreement(test, name, seed=seed)
        rows.append({
            "indicator": name, "rho": found["pooled"], "rho_95": list(found["bootstrap"]),
            "rho_within_layers": found["within"], "edges": len(edges), "images": images,
            "queries_left_out": unread,
        })  # fmt: skip
    sanity = [
        {"indicator": name, "redrawn": count, "rho": rho["truth"], "rho_original": rho["original"]}
        for count, found in sanity_agreement(test, arrays["redrawn"], indicators).items()
        for name, rho in found.items()
    ]
    return rows, sanity


def collect_groups(
    arrays: Mapping[str, np.ndarray],
    indicator: str,
    weights: Float[np.ndarray, "S n"],
) -> list[Row]:
    """Mean change of the predicted class's logit, and agreement, for each group of edges."""
    rows = []
    for kind in groups.KINDS:
        for share in groups.SHARES:
            change = arrays[f"{kind}/{share}/change"].astype(float)
            same = arrays[f"{kind}/{share}/predictions"] == arrays["unmasked"]
            agreement, span = curves.share(same, weights)
            rows.append({
                "indicator": indicator, "kind": kind, "share": share,
                "change": float(change.mean()), "change_95": curves.interval(weights @ change),
                "agreement": agreement, "agreement_95": span,
            })  # fmt: skip
    return rows
