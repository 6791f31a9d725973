"""A small made-up analysis with the names, dims and attributes of `vit_interact.analyze`."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

PATCH = 14


def picture_of(height: int, width: int, seed: int) -> np.ndarray:
    """A photograph-like picture: a bright blob on a gradient with some texture, uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    blob = np.exp(-((y - 0.4) ** 2 + (x - 0.55) ** 2) / 0.03)
    channels = [0.3 + 0.3 * y + 0.5 * blob, 0.5 - 0.2 * x + 0.3 * blob, 0.6 - 0.4 * y + 0.1 * blob]
    noise = rng.normal(0, 0.03, (height, width, 1))
    return (255 * np.clip(np.stack(channels, -1) + noise, 0, 1)).astype(np.uint8)


def boxes_around(rng: np.random.Generator, rows: int, cols: int, reach: int) -> np.ndarray:
    """Random boxes `[P, 4]` that hold their own patch."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    steps = rng.integers(0, reach, (4, rows * cols))
    return np.stack(
        [
            np.maximum(row - steps[0], 0),
            np.maximum(col - steps[1], 0),
            np.minimum(row + 1 + steps[2], rows),
            np.minimum(col + 1 + steps[3], cols),
        ],
        axis=-1,
    ).astype(np.int32)


def fields_of(rows_of: np.ndarray, rows: int, cols: int) -> dict[str, np.ndarray]:
    """Tendency, spread, axes, angle, eccentricity, entropy of normalised rows `[P, P]`."""
    place = np.mgrid[:rows, :cols].reshape(2, -1).T.astype(np.float64)
    total = rows_of.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        w = rows_of / total
        mean = w @ place
        apart = place[None] - place[:, None]
        spread = np.sqrt((w * (apart**2).sum(-1)).sum(-1))
        off = place[None] - mean[:, None]
        cov = np.einsum("ij,ija,ijb->iab", w, off, off)
        entropy = -(w * np.log(np.where(w > 0, w, 1))).sum(-1) / np.log(max(rows * cols, 2))
    good = np.isfinite(spread)
    axes = np.full((len(w), 2), np.nan)
    angle = np.full(len(w), np.nan)
    values, vectors = np.linalg.eigh(cov[good])
    axes[good] = np.sqrt(np.maximum(values[:, ::-1], 0))
    major = vectors[:, :, 1]
    angle[good] = np.arctan(major[:, 0] / np.where(major[:, 1] == 0, 1e-9, major[:, 1]))
    eccentricity = np.sqrt(np.maximum(1 - (axes[:, 1] / np.maximum(axes[:, 0], 1e-9)) ** 2, 0))
    return {
        "tendency": mean - place,
        "spread": spread,
        "axes": axes,
        "angle": angle,
        "eccentricity": np.where(good, eccentricity, np.nan),
        "entropy": np.where(good, entropy, np.nan),
    }


QUERY = {
    "tendency": ("query", "axis"),
    "spread": ("query",),
    "axes": ("query", "ellipse"),
    "angle": ("query",),
    "eccentricity": ("query",),
    "entropy": ("query",),
    "window": ("query", "box"),
    "area": ("query",),
    "interaction": ("query", "key"),
    "received_impact": ("row", "col"),
}


def one_map(
    rng: np.random.Generator, rows: int, cols: int, width: float, zero_rows: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """All variables of one image and layer."""
    patches = rows * cols
    place = np.mgrid[:rows, :cols].reshape(2, -1).T
    near = np.exp(-((place[None] - place[:, None]) ** 2).sum(-1) / (2 * width**2))
    object_at = np.exp(-((place - [0.4 * rows, 0.55 * cols]) ** 2).sum(-1) / (0.06 * patches))
    matrix = (near + 0.4 * object_at[None]) * rng.gamma(2.0, 0.5, (patches, patches))
    matrix[list(zero_rows)] = 0
    window = boxes_around(rng, rows, cols, 4)
    for patch in zero_rows:
        row, col = divmod(patch, cols)
        window[patch] = (row, col, row + 1, col + 1)
    size = (window[:, 2] - window[:, 0]) * (window[:, 3] - window[:, 1])
    received = matrix.sum(0) - np.diag(matrix)
    return {
        "interaction": matrix,
        "received_impact": received.reshape(rows, cols),
        "window": window,
        "area": size / patches,
        **fields_of(matrix, rows, cols),
    }


def make_dataset(
    rows: int = 8,
    cols: int = 8,
    layers: tuple[int, ...] = (0, 5, 11),
    names: tuple[str, ...] = ("cat.jpg", "dog.jpg"),
    *,
    zero_rows: tuple[int, ...] = (),
    picture: bool = True,
    class_names: tuple[str, ...] | None = ("accordion", "dalmatian", "chair", "crab", "cup"),
    indicator: str = "leave_one_out",
) -> xr.Dataset:
    """A made-up analysis of `len(names)` images."""
    patches = rows * cols
    rng = np.random.default_rng(rows * 100 + cols + len(layers))
    combined = [one_map(rng, rows, cols, 1.5, zero_rows) for _ in names]
    variables: dict[str, tuple] = {}
    for name, dims in QUERY.items():
        kind = np.int32 if name == "window" else np.float32
        stacked = np.stack([one[name] for one in combined]).astype(kind)
        if name == "interaction":
            total = stacked.sum(-1, keepdims=True)
            stacked = np.where(total > 0, stacked / np.where(total > 0, total, 1), 0)
        variables[f"combined_{name}"] = (("image", *dims), stacked)
    if layers:
        each = [
            [one_map(rng, rows, cols, 0.8 + 0.3 * k, zero_rows) for k in range(len(layers))]
            for _ in names
        ]
        for name, dims in QUERY.items():
            kind = np.int32 if name == "window" else np.float32
            stacked = np.stack([np.stack([m[name] for m in image]) for image in each])
            variables[name] = (("image", "layer", *dims), stacked.astype(kind))
    # A model predicts windows in its own layers, whichever were measured.
    own = (2, 3)
    windows = [[[boxes_around(rng, rows, cols, 3)] for _ in own] for _ in names]
    dims = ("image", "window_layer", "group", "query", "box")
    variables["predicted_window"] = (dims, np.array(windows, np.float32))
    order = np.stack(
        [np.argsort(m["received_impact"].ravel(), kind="stable") for m in combined]
    ).astype(np.int32)
    variables["removal_order"] = (("image", "query"), order)
    top = np.tile(np.array([1, 2, 0, 4, 3], np.int32), (len(names), 1))
    variables["prediction"] = (("image", "top"), top)
    share = np.tile(np.array([0.91, 0.05, 0.02, 0.01, 0.01], np.float32), (len(names), 1))
    variables["probability"] = (("image", "top"), share)
    variables["score"] = (("image",), np.full(len(names), 7.5, np.float32))
    if picture:
        pictures = [picture_of(rows * PATCH, cols * PATCH, k) for k in range(len(names))]
        variables["picture"] = (("image", "y", "x", "channel"), np.stack(pictures))
    coords: dict[str, object] = {
        "image": list(names),
        "box": ["top", "left", "bottom", "right"],
        "axis": ["row", "col"],
        "ellipse": ["major", "minor"],
        "window_layer": list(own),
    }
    if layers:
        coords["layer"] = list(layers)
    if class_names:
        coords["class_name"] = ("class", list(class_names))
    attrs = {
        "model": "vit_s14",
        "weights": "made-up.safetensors",
        "weights_sha256": "ab" * 32,
        "indicator": indicator,
        "indicator_unit": "change of the update",
        "coverage": 0.9,
        "score_of": "predicted",
        "patch_size": PATCH,
        "rows": rows,
        "cols": cols,
        "prefix": 1,
        "preprocess": json.dumps({"size": rows * PATCH, "mean": [0.5, 0.5, 0.5]}),
        "versions": json.dumps({"vit_interact": "0.1.0", "jax": "0.10.2"}),
    }
    assert patches == rows * cols
    return xr.Dataset(variables, coords=coords, attrs=attrs)
