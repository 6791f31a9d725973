"""Finished parts of a verification to figures: one table of rows, ready for JSON and CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from vit_interact.interactions.indicators import INDICATORS
from vit_interact.models.config import ViTConfig
from vit_interact.verify import curves
from vit_interact.verify.faithfulness import collect_edges, collect_groups
from vit_interact.verify.parts import Parts
from vit_interact.verify.run import Plan
from vit_interact.verify.subject import Subject
from vit_interact.verify.windows import VARIANTS, attention_flops_share

Row = dict[str, Any]


def collect(
    parts: Parts, plan: Plan, subject: Subject, config: ViTConfig | None = None
) -> dict[str, Any]:
    """Accuracies with 95 % bootstrap intervals over images, of every setting.

    Args:
      parts: all finished.
      plan: what was verified.
      subject: the model.
      config: of our model, for its faithfulness.

    Returns:
      `base`: top-1 of the unrestricted model; `windows`, `removal`, `removal_auc`, `faithfulness`,
      `sanity`, `groups`: rows; `seconds_per_image` by part.
    """
    base = parts.load("base", "model")
    labels, predicted = base["labels"], base["predictions"]
    images = len(labels)
    weights = curves.resample(images, plan.seed)
    top1, span = curves.share(predicted == labels, weights)
    found: dict[str, Any] = {"base": {"top1": top1, "top1_95": span, "images": images}}
    for kind in ("windows", "removal", "removal_auc", "faithfulness", "sanity", "groups"):
        found[kind] = []
    seconds = {"base": float(base["seconds"].mean())}
    for test, name in plan.parts():
        if test in ("base", "average"):
            continue
        arrays = parts.load(test, name)
        seconds[f"{test}/{name}"] = float(arrays.pop("seconds").mean())
        if test in ("windows", "data"):
            found["windows"] += _windows(name, arrays, plan, subject, labels, predicted, weights)
        elif test == "edges":
            assert config is not None
            found["faithfulness"], found["sanity"] = collect_edges(
                arrays, plan.indicators, config, plan.seed
            )
        elif test == "groups":
            found["groups"] += collect_groups(arrays, name, weights)
        else:
            curve, areas = _removal(name, arrays, plan, labels, predicted, weights)
            found["removal"] += curve
            found["removal_auc"] += areas
    found["seconds_per_image"] = seconds
    return found


def _windows(
    name: str, arrays: dict[str, np.ndarray], plan: Plan, subject: Subject,
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray,
) -> list[Row]:  # fmt: skip
    rows = []
    for key in sorted(arrays):
        variant, kind, what = key.split("/")
        if what != "predictions":
            continue
        areas = arrays[f"{variant}/{kind}/area"]
        for coverage, guesses, area in zip(plan.coverages, arrays[key], areas, strict=True):
            top1, span = curves.share(guesses == labels, weights)
            rows.append({
                "indicator": name, "variant": variant, "kind": kind, "coverage": coverage,
                "area": float(area.mean()), "top1": top1, "top1_95": span,
                "agreement": float((guesses == predicted).mean()),
                "attention_flops": attention_flops_share(float(area.mean()), subject.layout),
            })  # fmt: skip
    return rows


def _removal(
    name: str, arrays: dict[str, np.ndarray], plan: Plan,
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray,
) -> tuple[list[Row], list[Row]]:  # fmt: skip
    curve: list[Row] = []
    areas: list[Row] = []
    shares = [0.0, *plan.shares]
    for key in sorted(arrays):
        order, how = key.split("/")
        guesses = np.concatenate([predicted[None], arrays[key]])
        named = {"order": order if name == "controls" else f"{name}/{order}", "intervention": how}
        for removed, one in zip(shares, guesses, strict=True):
            top1, span = curves.share(one == labels, weights)
            agreement = float((one == predicted).mean())
            row = {**named, "removed": removed, "top1": top1, "top1_95": span}
            curve.append({**row, "agreement": agreement})
        auc, span = curves.removal_auc(shares, guesses == labels, weights)
        areas.append({**named, "auc": auc, "auc_95": span})
    return curve, areas


def to_csv(found: dict[str, Any]) -> str:
    """Tidy rows: one figure a line with its interval, and what it is of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["test", "subject", "variant", "setting", "metric", "value", "low", "high"])
    for row in found["windows"]:
        what = ["windows", row["indicator"], f"{row['variant']}/{row['kind']}", row["coverage"]]
        writer.writerow([*what, "top1", row["top1"], *row["top1_95"]])
        for metric in ("area", "agreement", "attention_flops"):
            writer.writerow([*what, metric, row[metric], "", ""])
    for row in found["removal"]:
        what = ["removal", row["order"], row["intervention"], row["removed"]]
        writer.writerow([*what, "top1", row["top1"], *row["top1_95"]])
        writer.writerow([*what, "agreement", row["agreement"], "", ""])
    for row in found["removal_auc"]:
        what = ["removal", row["order"], row["intervention"], ""]
        writer.writerow([*what, "auc", row["auc"], *row["auc_95"]])
    for row in found["faithfulness"]:
        what = ["faithfulness", row["indicator"], "edges", ""]
        writer.writerow([*what, "rho", row["rho"], *row["rho_95"]])
        writer.writerow([*what, "rho_within_layers", row["rho_within_layers"], "", ""])
    for row in found["sanity"]:
        what = ["faithfulness", row["indicator"], "blocks_redrawn", row["redrawn"]]
        for metric in ("rho", "rho_original"):
            writer.writerow([*what, metric, row[metric], "", ""])
    for row in found["groups"]:
        what = ["faithfulness", row["indicator"], f"mask_{row['kind']}", row["share"]]
        for metric in ("change", "agreement"):
            writer.writerow([*what, metric, row[metric], *row[f"{metric}_95"]])
    return text.getvalue()


def rank_windows(found: dict[str, Any]) -> list[Row]:
    """Indicators by top-1 averaged over window areas up to half of the grid, best first.

    Curves are compared at equal areas: each is interpolated between its coverages, and below the
    smallest area measured down to nothing, so that large windows alone do not win.
    """
    grid = np.linspace(0.05, 0.5, 46)
    ranked = []
    for name in [n for n in INDICATORS if any(r["indicator"] == n for r in found["windows"])]:
        row: Row = {"indicator": name}
        for variant, kind in sorted({(r["variant"], r["kind"]) for r in found["windows"]}):
            wanted = (name, variant, kind)
            own = [r for r in found["windows"]
                   if (r["indicator"], r["variant"], r["kind"]) == wanted]  # fmt: skip
            own.sort(key=lambda r: r["area"])
            areas, top1 = [0.0, *(r["area"] for r in own)], [0.0, *(r["top1"] for r in own)]
            row[f"{variant}/{kind}"] = float(np.interp(grid, areas, top1).mean())
        ranked.append(row)
    own = [f"{variant}/indicator" for variant in VARIANTS]
    return sorted(ranked, key=lambda row: -max(row.get(name, 0.0) for name in own))


def rank_removal(found: dict[str, Any]) -> list[Row]:
    """Orders of removal by area under the accuracy curve, best first within an intervention."""
    return sorted(found["removal_auc"], key=lambda r: (r["intervention"], -r["auc"]))
