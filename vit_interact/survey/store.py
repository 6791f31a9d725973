"""Surveys on disk: one zarr store, labelled, that can be read, resumed and merged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vit_interact.interactions.statistics import Statistics
from vit_interact.survey.quantities import Design

if TYPE_CHECKING:
    import xarray as xr

_FIELDS = ("count", "mean", "m2", "min", "max", "mean_rest")


@jax.jit
def _variances(statistics: dict[str, Statistics]) -> dict[str, Array]:
    """As one program: three for each shape would take a second to compile."""
    return {name: one.variance for name, one in statistics.items()}


def to_dataset(
    design: Design, statistics: Mapping[str, Statistics], about: Mapping[str, Any]
) -> xr.Dataset:
    """Labelled arrays: `QUANTITY_mean` and so on, with `QUANTITY_variance` for readers.

    Args:
      design: what was surveyed.
      statistics: of every quantity.
      about: what to say of it; JSON-safe.
    """
    import xarray as xr

    variables: dict[str, Any] = {}
    variances = _variances(dict(statistics))
    for name, one in design.quantities().items():
        own = statistics[name]
        attrs = {"units": one.unit, "long_name": one.what}
        for field in _FIELDS:
            what = {"count": "1", "m2": f"({one.unit})^2"}.get(field, one.unit)
            values = np.asarray(getattr(own, field))
            variables[f"{name}_{field}"] = (one.dims, values, {**attrs, "units": what})
        spread = {**attrs, "units": f"({one.unit})^2"}
        variables[f"{name}_variance"] = (one.dims, np.asarray(variances[name]), spread)
        if own.histogram is not None:
            bins, edges = f"{name}_bin", f"{name}_edge"
            counts = np.asarray(own.histogram)
            variables[f"{name}_histogram"] = ((*one.dims, bins), counts, {**attrs, "units": "1"})
            variables[f"{name}_edges"] = ((edges,), np.asarray(own.edges), attrs)
    rows, cols = design.layout.rows, design.layout.cols
    coordinates = {
        "layer": np.arange(design.depth),
        "head": np.arange(design.heads),
        "row_offset": np.arange(1 - rows, rows),
        "col_offset": np.arange(1 - cols, cols),
        "coverage": np.array(design.coverages),
    }
    used = {dim for dims, *_ in variables.values() for dim in dims}
    dataset = xr.Dataset(variables, {k: v for k, v in coordinates.items() if k in used})
    dataset.attrs = {
        "title": "statistics of patch interactions",
        "design": json.dumps(dataclasses.asdict(design)),
        "about": json.dumps(dict(about)),
    }
    return dataset


def save(path: Path, dataset: xr.Dataset) -> None:
    """Writes a store so that a kill leaves either the old or the new one."""
    unfinished, old = (path.with_name(path.name + end) for end in (".unfinished", ".old"))
    for left in (unfinished, old):
        shutil.rmtree(left, ignore_errors=True)
    dataset.to_zarr(unfinished, mode="w", consolidated=False)
    if path.exists():
        os.replace(path, old)
    os.replace(unfinished, path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Puts the old store back when a kill came between the two renames of `save`."""
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        os.replace(old, path)


def load_survey(path: str | Path) -> tuple[Design, dict[str, Statistics], dict[str, Any]]:
    """Reads a store.

    Returns:
      What was surveyed, the statistics of every quantity, and what is said of it.

    Raises:
      ValueError: when this is not a store of ours.
    """
    import xarray as xr

    from vit_interact.layout import TokenLayout

    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such store")
    try:
        with xr.open_zarr(path, consolidated=False, chunks=None) as dataset:
            dataset.load()
        kept = json.loads(dataset.attrs["design"])
        design = Design(
            TokenLayout(**kept["layout"]), kept["depth"], kept["heads"],
            tuple(kept["indicators"]), tuple(kept["coverages"]), kept.get("values", False),
        )  # fmt: skip
        statistics = {}
        for name, one in design.quantities().items():
            fields = {field: jnp.asarray(dataset[f"{name}_{field}"].values) for field in _FIELDS}
            if one.low is not None:
                fields["edges"] = jnp.asarray(dataset[f"{name}_edges"].values)
                fields["histogram"] = jnp.asarray(dataset[f"{name}_histogram"].values)
            statistics[name] = Statistics(**fields)
        return design, statistics, json.loads(dataset.attrs["about"])
    except (KeyError, ValueError, OSError, TypeError) as error:
        raise ValueError(f"{path} is not a store of vit-interact statistics: {error}") from error


def merge_surveys(paths: Sequence[str | Path], out: str | Path) -> xr.Dataset:
    """Merges stores of the same model and design over different images, and writes the result.

    Args:
      paths: two or more stores.
      out: where the merged store goes; must not exist.

    Raises:
      ValueError: when stores differ in more than their images, share images, or `out` exists.
    """
    if len(paths) < 2:
        raise ValueError("merging takes two stores or more")
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; use another --out")
    design, statistics, about = load_survey(paths[0])
    for path in paths[1:]:
        other_design, other, other_about = load_survey(path)
        check_same(other_design, other_about, design, about, path)
        for start, end in other_about["ranges"]:
            for first, last in about["ranges"]:
                if other_about["data"] == about["data"] and start < last and first < end:
                    raise ValueError(
                        f"{path} and an earlier store both hold images "
                        f"{max(start, first)} to {min(end, last) - 1} of {about['data']}"
                    )
        statistics = {name: own.merge(other[name]) for name, own in statistics.items()}
        about = {**about, "ranges": sorted([*about["ranges"], *other_about["ranges"]])}
        if other_about["data"] != about["data"]:
            about["data"] = f"{about['data']} + {other_about['data']}"
    about["images"] = sum(end - start for start, end in about["ranges"])
    design.check_count(about["images"])
    dataset = to_dataset(design, statistics, about)
    save(out, dataset)
    return dataset


def check_same(
    design: Design, about: Mapping[str, Any], known: Design, known_about: Mapping[str, Any],
    where: object,
) -> None:  # fmt: skip
    """Refuses a survey of another model or design, and says what differs."""
    differs = [
        field.name
        for field in dataclasses.fields(design)
        if getattr(design, field.name) != getattr(known, field.name)
    ]
    differs += [key for key in ("weights_sha256", "preprocess") if about[key] != known_about[key]]
    if differs == ["values"]:
        raise ValueError(
            f"{where} {'has' if design.values else 'lacks'} histograms of values and the other "
            "survey not: one of them is of an earlier version; make it again"
        )
    if differs:
        raise ValueError(f"{where} is a survey with other {', '.join(differs)}")
