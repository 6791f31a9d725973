"""One image of an analysis as plain arrays in the units the drawings use.

All drawings are in patches: patch `(row, col)` covers `[col, col + 1] x [row, row + 1]`, rows grow
downwards, and the picture is stretched over as many patches as it is large. So windows, arrows and
ellipses enter the axes as the numbers they are, whatever the shape of a patch or of the grid.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vit_interact.viz import style
from vit_interact.viz.image_data import ImageData

#: Patches shown as examples along one side of the grid.
SAMPLE_SIDE = 3


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image: `Scene(ds.isel(image=i))`.

    Attributes:
      data: the dataset of one image, without the dimension `image`.

    Raises:
      ValueError: if the dataset still has the dimension `image`, or no combined impact.
    """

    data: ImageData

    def __post_init__(self) -> None:
        if "image" in self.data.dims:
            raise ValueError(
                "the dataset holds several images: choose one with ds.isel(image=0) or "
                "ds.sel(image=NAME)"
            )
        if "combined_received_impact" not in self.data:
            raise ValueError(
                "the dataset has no variable combined_received_impact: make it with "
                "vit_interact.analyze"
            )

    @property
    def name(self) -> str:
        """File name of the image, if the dataset names its images."""
        return str(self.data["image"].item()) if "image" in self.data.coords else "unnamed image"

    @property
    def rows(self) -> int:
        """Rows `R` of the patch grid."""
        return int(self.data.sizes["row"])

    @property
    def cols(self) -> int:
        """Columns `C` of the patch grid."""
        return int(self.data.sizes["col"])

    @property
    def patches(self) -> int:
        """`P = R * C`."""
        return self.rows * self.cols

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that were kept, possibly none."""
        if "layer" not in self.data.dims:
            return []
        return [int(layer) for layer in np.atleast_1d(self.data["layer"].values)]

    def array(self, name: str) -> np.ndarray:
        """The values of a variable; KeyError with the names there are if it is missing."""
        if name not in self.data:
            raise KeyError(
                f"the dataset has no variable {name}; it has {sorted(map(str, self.data))}"
            )
        return np.asarray(self.data[name].values)

    def grid(self, name: str) -> Float[np.ndarray, "R C"]:
        """A variable with one value a patch, as a map."""
        return self.array(name).reshape(self.rows, self.cols)

    @functools.cached_property
    def picture(self) -> UInt8[np.ndarray, "y x 3"] | None:
        """The picture the model saw, or None if it was not kept. Grey ones become RGB."""
        if "picture" not in self.data:
            return None
        picture = self.array("picture").astype(np.uint8, copy=False)
        return np.repeat(picture, 3, axis=-1) if picture.shape[-1] == 1 else picture[..., :3]

    @functools.cached_property
    def grey(self) -> UInt8[np.ndarray, "y x 3"] | None:
        """The picture without colours (Rec. 601 luma), so that only data is coloured above it."""
        if self.picture is None:
            return None
        luma = self.picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return np.repeat(np.round(luma).astype(np.uint8)[..., None], 3, axis=-1)

    @functools.cached_property
    def patch_pixels(self) -> tuple[float, float]:
        """Height and width of one patch in pixels of the picture.

        The attribute `patch_size` where it gives this grid (then a last part of the picture that
        fills no patch stays bare, as the model left it out); else the picture over the grid.
        """
        size = self.data.attrs.get("patch_size", 16)
        high, wide = (float(s) for s in (size if np.size(size) == 2 else (np.min(size),) * 2))
        if self.picture is None:
            return high, wide
        y, x = self.picture.shape[:2]
        if (y // high, x // wide) == (self.rows, self.cols):
            return high, wide
        return y / self.rows, x / self.cols

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width of the picture in patches, `(R, C)` where patches fill it."""
        if self.picture is None:
            return float(self.rows), float(self.cols)
        high, wide = self.patch_pixels
        return self.picture.shape[0] / high, self.picture.shape[1] / wide

    @property
    def aspect(self) -> float:
        """Width over height of the picture as it looks."""
        high, wide = self.patch_pixels
        return self.extent[1] * wide / (self.extent[0] * high)

    @functools.cached_property
    def blank_queries(self) -> Bool[np.ndarray, " P"]:
        """Patches whose row is zero or not a number, so that no field is defined."""
        if "combined_spread" in self.data:
            return ~np.isfinite(self.array("combined_spread"))
        return np.zeros(self.patches, bool)

    @property
    def coverage(self) -> float:
        """Share of a row that a window holds."""
        return float(self.data.attrs.get("coverage", np.nan))

    def prediction(self, limit: int = 32) -> str:
        """The first predicted class and its probability, such as `dalmatian (97.3 %)`.

        Args:
          limit: longest class name in characters; longer ones are cut in the middle.
        """
        best = predictions(self.data)[:1]
        if not best:
            return "a model without classes"
        name, probability = best[0]
        return f"{style.shorten(name, limit)} ({style.percent(probability, 1)})"

    def title(self, subject: str) -> str:
        """First line of a figure: what is drawn, of which file."""
        return f"{subject}  ·  {style.shorten(self.name, 60)}"

    def subtitle(self) -> str:
        """Second line: prediction, indicator, coverage, layers."""
        layers = self.layers
        if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
            told = f"layers {layers[0]}-{layers[-1]}"
        elif 0 < len(layers) <= 6:
            told = ("layers " if len(layers) > 1 else "layer ") + ", ".join(map(str, layers))
        else:
            told = f"{len(layers)} layers" if layers else "no single layers kept"
        name = style.indicator_style(str(self.data.attrs.get("indicator", "unknown"))).label
        seen = f"predicted: {self.prediction()}" if predictions(self.data) else self.prediction()
        parts = [seen, f"indicator: {style.shorten(name, 30)}"]
        if np.isfinite(self.coverage):
            parts.append(f"coverage {style.percent(self.coverage)}")
        return "  ·  ".join([*parts, told])


def predictions(data: ImageData) -> list[tuple[str, float]]:
    """Predicted classes of one image with their probabilities (0 to 1), best first.

    A class is its name where `class_name` has it, else such as `class 17`. Empty for
    a model without classes.
    """
    if "prediction" not in data:
        return []
    names = data["class_name"].values if "class_name" in data else ()
    numbers = np.atleast_1d(data["prediction"].values)
    shares = np.atleast_1d(data["probability"].values)
    return [
        (str(names[n]) if 0 <= n < len(names) else f"class {n}", float(share))
        for n, share in zip(numbers, shares, strict=True)
    ]


def coverage_map(
    windows: Int[np.ndarray, "P 4"], rows: int, cols: int
) -> Float[np.ndarray, "rows cols"]:
    """`f_j = #{i : j in W_i} / P`: the share of all windows that hold each patch.

    Args:
      windows: `(top, left, bottom, right)` for each patch, bottom and right exclusive.
      rows: rows of the grid.
      cols: columns of the grid.
    """
    # Four corners for each box, then sums along both axes: O(P), in place of O(P * P) masks.
    steps = np.zeros((rows + 1, cols + 1), np.int64)
    top, left, bottom, right = windows.T
    np.add.at(steps, (top, left), 1)
    np.add.at(steps, (bottom, right), 1)
    np.add.at(steps, (top, right), -1)
    np.add.at(steps, (bottom, left), -1)
    return steps.cumsum(0).cumsum(1)[:rows, :cols] / len(windows)


def spaced_strongest(
    impact: Float[np.ndarray, "R C"], count: int, distance: int = 2
) -> Int[np.ndarray, " n"]:
    """Patches of the highest impact, none within `distance` rows and columns of a stronger one.

    Neighbours have nearly the same rows, so the strongest alone would show one thing many times.
    Where the grid is too small for `count` of them the strongest of the others fill up.

    Returns:
      Patch numbers, strongest first among the spaced ones; the lower number first when equal.
      Patches without a finite impact are never chosen.
    """
    flat, width = np.asarray(impact, np.float64).ravel(), impact.shape[1]
    order = [p for p in np.argsort(-flat, kind="stable") if np.isfinite(flat[p])]
    chosen: list[int] = []
    for patch in order:
        row, col = divmod(int(patch), width)
        gaps = (max(abs(row - c // width), abs(col - c % width)) for c in chosen)
        if all(gap > distance for gap in gaps):
            chosen.append(int(patch))
        if len(chosen) == count:
            break
    chosen += [int(p) for p in order if p not in chosen][: count - len(chosen)]
    return np.array(chosen, np.int64)


def spread_sample(rows: int, cols: int) -> Int[np.ndarray, "down across"]:
    """`SAMPLE_SIDE` x `SAMPLE_SIDE` patches evenly spread over the grid, fewer on tiny grids."""
    down, across = min(rows, SAMPLE_SIDE), min(cols, SAMPLE_SIDE)
    row = ((np.arange(down) + 0.5) * rows / down).astype(np.int64)
    col = ((np.arange(across) + 0.5) * cols / across).astype(np.int64)
    return row[:, None] * cols + col
