"""What the viewer shows, made small: maps quantised row by row, compressed, one blob a map.

An entry `x` of a row whose largest entry is `m` is kept as `q = round(sqrt(x / m) * n)`, `n` being
255 or 65535, with `m` beside the row: square roots leave small entries their digits, and most of a
row is small. What rounding takes from one entry is added to the next one, so that sums over many
patches, which windows are made of, stay within the rounding of one of them. On a ViT-S/14 8 bits so
change 0.9 to 1.4 % of the windows of 50 and 90 % coverage; rounded to even steps they changed 6 to
15 %, and without the carry 1.3 to 2.0 %. The page says what it is for its own data.
"""

from __future__ import annotations

import base64
import io
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import matplotlib as mpl
import numpy as np
import xarray as xr
from jaxtyping import Float, UInt
from PIL import Image

from vit_interact.data.naming import visible
from vit_interact.viz import style
from vit_interact.viz.scene import Scene, predictions
from vit_interact.viz.wheel import cyclic_lab, oklab_to_srgb

#: Maps whose windows are compared with those of unquantised ones, over all images and indicators.
_COMPARED = 24
_COMPARED_LARGE = 3
_LARGE = 400  # patches from which windows take long

# Entries of maps that are quantised together: columns follow one another, so that small maps one by
# one would wait for Python.
_TOGETHER = 2**20

#: Pages grow no larger unless images are chosen by name.
PAGE_BYTES = 80e6

_T = TypeVar("_T")

Quantised = tuple[UInt[np.ndarray, "*n P"], Float[np.ndarray, "*n"]]


class Agreement(NamedTuple):
    """How far quantised maps and their windows are from the arrays.

    Attributes:
      differ: share of windows that differ.
      compared: windows compared, none of them of rows of zeros.
      coverage: of the windows.
      error: the largest difference of an entry of these rows, as a share of its row's largest.
    """

    differ: float
    compared: int
    coverage: float
    error: float


def fitting(data: xr.Dataset, bits: int = 8) -> int:
    """How many images of a dataset make a page of about `PAGE_BYTES`; at least 1."""
    patches, layers = data.sizes.get("query", 1), data.sizes.get("layer", 0)
    maps = (layers + 1) * (1 + data.sizes.get("other", 0))
    # A byte an entry is 0.85 compressed (16 bits: 1.7), and text takes 4 characters for 3 bytes.
    image = maps * patches**2 * (bits / 8) * 0.85 * 4 / 3 + 30_000
    return max(1, min(data.sizes.get("image", 0), int(PAGE_BYTES / image)))


def quantise(rows: Float[np.ndarray, "*n P"], bits: int = 8) -> Quantised:
    """Non-negative rows as small integers; see the module.

    Args:
      rows: any unit; NaN counts as 0.
      bits: 8 or 16.

    Returns:
      Integers `[..., P]` and the largest entry of each row, 0 for a row of zeros.
    """
    levels = 2**bits - 1
    rows = np.where((rows > 0) & (rows < np.inf), rows, rows.dtype.type(0))
    scale = rows.max(axis=-1).astype(np.float32)
    largest = np.where(scale > 0, scale, 1.0)
    found = np.empty(rows.shape, np.uint8 if bits == 8 else np.uint16)
    carry = np.zeros(scale.shape)
    for column in range(rows.shape[-1]):
        wanted = rows[..., column].astype(np.float64) / largest + carry
        level = np.rint(np.sqrt(wanted.clip(0.0, 1.0)) * levels)
        found[..., column] = level
        carry = wanted - (level / levels) ** 2
    return found, scale


def dequantise(
    found: UInt[np.ndarray, "*n P"], scale: Float[np.ndarray, "*n"]
) -> Float[np.ndarray, "*n P"]:
    """Rows in float32, bit for bit what the page computes."""
    levels = np.iinfo(found.dtype).max
    unit = found.astype(np.float64) / levels
    return (unit * unit * scale.astype(np.float64)[..., None]).astype(np.float32)


class Pack:
    """The maps of a dataset, image by image, as the viewer wants them.

    Attributes:
      data: the dataset, without images that were not asked for.
      indicators: names, the one of the windows first.
      bits: of an entry.
    """

    def __init__(self, data: xr.Dataset, bits: int = 8) -> None:
        """Looks at a dataset; maps are not read yet.

        Args:
          data: from `vi.analyze`, `vi.analyze_files` or an `analysis.zarr`.
          bits: 8, or 16 for twice the size.

        Raises:
          ValueError: if it is not such a dataset, or holds no images.
        """
        if bits not in (8, 16):
            raise ValueError(f"bits={bits}: expected 8 or 16")
        missing = [n for n in ("interaction", "combined_received_impact") if n not in data]
        if missing:
            raise ValueError(
                f"the dataset has no variable {missing[0]}: expected one of vit_interact.analyze"
            )
        if not data.sizes.get("image", 0):
            raise ValueError("the dataset holds no images")
        maps = {name: data[name] for name in data.data_vars if "key" in data[name].dims}
        # One by one, image by image, the rest would take longer to find than all of it to read.
        self.data = data.drop_vars(list(maps)).compute().assign(maps)
        self.bits = bits
        self.indicators = [str(data.attrs.get("indicator", "unknown"))]
        if "other" in data.coords:
            self.indicators += [str(name) for name in data["other"].values]
        self.scenes = [Scene(self.data.isel(image=k)) for k in range(data.sizes["image"])]

    @property
    def model(self) -> str:
        """What was measured."""
        return visible(str(self.data.attrs.get("model", "unknown model")))

    def meta(self) -> dict[str, Any]:
        """All that is small, for JSON."""
        first = self.scenes[0]
        windows = self.data.get("predicted_window")
        return {
            "rows": first.rows,
            "cols": first.cols,
            "extent": list(first.extent),
            "aspect": first.aspect,
            "bits": self.bits,
            "layers": first.layers,
            "model": self.model,
            "score": str(self.data.attrs.get("score_of", "")),
            "coverage": first.coverage if np.isfinite(first.coverage) else 0.9,
            "indicators": [self._told(name) for name in self.indicators],
            "windowLayers": [] if windows is None else _numbers(self.data["window_layer"]),
            "windowGroups": 0 if windows is None else int(windows.sizes["group"]),
            "images": [self._image(scene) for scene in self.scenes],
            "colors": _color_tables(),
            "agreement": self.agreement()._asdict(),
        }

    def keys(self) -> Iterator[str]:
        """Names of all blobs, those of the first view first."""
        for k in range(len(self.scenes)):
            for name in self.indicators:
                yield f"{k}/{name}/impact"
                yield f"{k}/{name}/all"
                yield from (f"{k}/{name}/{layer}" for layer in self.scenes[0].layers)
            if "predicted_window" in self.data:
                yield f"{k}/predicted"

    def blob(self, key: str) -> bytes:
        """One of `keys`: little-endian, deflated.

        Returns:
          `IMAGE/INDICATOR/LAYER`: the scales of a map, float32 `[P]`, and its integers `[P, P]`, 16
          bits as all high bytes before all low ones; `.../impact`: received impact over all layers
          and in each, float32 `[1 + L, P]`; `IMAGE/predicted`: float32 `[W, G, P, 4]`.

        Raises:
          KeyError: for another key.
        """
        image, _, rest = key.partition("/")
        if not image.isdecimal() or int(image) >= len(self.scenes):
            raise KeyError(key)
        scene = self.scenes[int(image)]
        if rest == "predicted" and "predicted_window" in self.data:
            return _deflated(scene.array("predicted_window").astype("<f4").tobytes())
        name, _, layer = rest.partition("/")
        if name not in self.indicators:
            raise KeyError(key)
        if layer == "impact":
            whole = self._array(scene, "combined_received_impact", name)[None]
            impact = np.concatenate([whole, self._array(scene, "received_impact", name)])
            return _deflated(impact.astype("<f4").tobytes())
        return _packed(*quantise(self.map(int(image), name, layer), self.bits))

    def blobs(self) -> Iterator[tuple[str, bytes]]:
        """All of `keys` with their blobs; of an image several small maps are made at a time."""
        several = max(1, _TOGETHER // (self.scenes[0].rows * self.scenes[0].cols) ** 2)
        layers: list[str | int] = ["all", *self.scenes[0].layers]
        some_layers = [layers[start : start + several] for start in range(0, len(layers), several)]
        images = range(len(self.scenes))
        parts = itertools.product(images, self.indicators, some_layers)
        before: list[tuple[str, Future[bytes]]] = []
        # Neither reading nor compressing needs the interpreter for long: the next maps are read,
        # and those of the image before are compressed, while some are quantised.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as meanwhile:
            maps = _one_ahead(reader, self._maps, parts)
            for k in images:
                now = []
                for name in self.indicators:
                    key = f"{k}/{name}/impact"
                    now.append((key, meanwhile.submit(self.blob, key)))
                    for some in some_layers:
                        made = quantise(next(maps), self.bits)
                        for layer, *one in zip(some, *made, strict=True):
                            now.append((f"{k}/{name}/{layer}", meanwhile.submit(_packed, *one)))
                if "predicted_window" in self.data:
                    key = f"{k}/predicted"
                    now.append((key, meanwhile.submit(self.blob, key)))
                yield from ((key, blob.result()) for key, blob in before)
                before = now
            yield from ((key, blob.result()) for key, blob in before)

    def map(self, image: int, name: str, layer: str | int) -> Float[np.ndarray, "P P"]:
        """A map as it was measured; `layer` is a number, or "all" for all layers together.

        Raises:
          KeyError: for a layer that was not measured.
        """
        if str(layer) not in ("all", *map(str, self.scenes[image].layers)):
            raise KeyError(f"{image}/{name}/{layer}")
        return self._maps(image, name, [layer if layer == "all" else int(layer)])[0]

    def _maps(
        self, image: int, name: str, layers: Sequence[str | int]
    ) -> Float[np.ndarray, "n P P"]:
        """Some of "all" and, behind it, numbers of layers that follow one another."""
        scene = self.scenes[image]
        numbers = [scene.layers.index(int(layer)) for layer in layers if layer != "all"]
        found = []
        if "all" in layers:
            found.append(self._array(scene, "combined_interaction", name)[None])
        if numbers:
            some = slice(numbers[0], numbers[-1] + 1)
            found.append(self._array(scene, "interaction", name, some))
        return np.concatenate(found)

    def agreement(self) -> Agreement:
        """Compares quantised maps and their windows with the arrays, on maps spread over all."""
        from vit_interact.layout import TokenLayout
        from vit_interact.observe.analyze import windows_of

        prefix = int(self.data.attrs.get("prefix", 0))
        layout = TokenLayout(self.scenes[0].rows, self.scenes[0].cols, prefix)
        coverage = self.scenes[0].coverage
        coverage = coverage if np.isfinite(coverage) else 0.9
        places: list[tuple[int, str, str | int]] = [
            (k, name, layer)
            for layer in ("all", *self.scenes[0].layers)
            for k in range(len(self.scenes))
            for name in self.indicators
        ]
        most = _COMPARED_LARGE if layout.num_patches > _LARGE else _COMPARED
        step = max(1, len(places) // most)
        # All maps at once: of one image they are as many as `analyze` has had compiled.
        rows = np.stack([np.nan_to_num(self.map(*place)) for place in places[::step][:most]])
        quantised = dequantise(*quantise(rows, self.bits))
        exact, rounded = (
            np.asarray(windows_of(maps, layout, coverage)[0]) for maps in (rows, quantised)
        )
        largest = rows.max(-1)
        real = largest > 0
        differ = int((exact != rounded).any(-1)[real].sum())
        compared = int(real.sum())
        off = np.abs(rows - quantised).max(-1)[real] / largest[real]
        return Agreement(differ / max(1, compared), compared, coverage, float(off.max(initial=0.0)))

    def _array(
        self, scene: Scene, variable: str, name: str, layers: slice | None = None
    ) -> np.ndarray:
        """A variable of one image for one of the indicators, read from disk no more than needed."""
        data = cast("xr.Dataset", scene.data)
        if name == self.indicators[0]:
            found = data[variable]
        else:
            found = data[f"other_{variable}"].isel(other=self.indicators.index(name) - 1)
        return np.asarray((found if layers is None else found.isel(layer=layers)).values)

    def _told(self, name: str) -> dict[str, str]:
        known = style.indicator_style(name)
        return {
            "name": name,
            "label": known.label,
            "color": known.color,
            "unit": known.unit,
            "combinedUnit": style.combined_unit(name),
        }

    def _image(self, scene: Scene) -> dict[str, Any]:
        guesses = predictions(scene.data)
        return {
            "name": visible(scene.name),
            "label": _label(scene),
            "guesses": [[visible(name), share] for name, share in guesses],
            # Of a model without classes it would be the largest of outputs that nobody named.
            "score": float(scene.data["score"].item())
            if guesses and "score" in scene.data
            else None,
            "picture": _picture(scene),
        }


def _one_ahead(
    pool: Executor, function: Callable[..., _T], arguments: Iterable[tuple[Any, ...]]
) -> Iterator[_T]:
    """What a function gives for each of some arguments, the next being made while one is used."""
    before: Future[_T] | None = None
    for some in arguments:
        now = pool.submit(function, *some)
        if before is not None:
            yield before.result()
        before = now
    if before is not None:
        yield before.result()


def _label(scene: Scene) -> str | None:
    """The class an image is of: the nearest of its folders that is called like one."""
    if "class_name" not in scene.data:
        return None
    known = {str(name) for name in scene.data["class_name"].values}
    folders = scene.name.split("/")[:-1]
    return next((visible(folder) for folder in reversed(folders) if folder in known), None)


def _picture(scene: Scene) -> str | None:
    """The photograph as an address that holds it."""
    if scene.picture is None:
        return None
    file = io.BytesIO()
    Image.fromarray(scene.picture).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _color_tables() -> dict[str, str]:
    """Colour maps of the figures, RGB bytes; `direction` is the rim of the wheel in OKLab."""
    tables = {
        name: mpl.colormaps[style.COLORMAPS[name]](np.linspace(0, 1, 256))[:, :3]
        for name in ("impact", "signed")
    }
    lab = cyclic_lab()
    # The wheel from its white centre to its rim, in 16 steps of saturation.
    white = np.array([1.0, 0.0, 0.0])
    steps = np.linspace(0, 1, 16)[:, None, None]
    tables["wheel"] = oklab_to_srgb(white + steps * (lab - white))
    return {
        name: base64.b64encode(np.rint(table * 255).astype(np.uint8).tobytes()).decode()
        for name, table in tables.items()
    }


def _numbers(values: xr.DataArray) -> list[int]:
    return [int(value) for value in np.atleast_1d(values.values)]


def _packed(found: UInt[np.ndarray, "P P"], scale: Float[np.ndarray, " P"]) -> bytes:
    """A quantised map as a blob."""
    low = (found & 255).astype(np.uint8).tobytes()
    high = (found >> 8).astype(np.uint8).tobytes() if found.dtype == np.uint16 else b""
    return _deflated(scale.astype("<f4").tobytes() + high + low)


def _deflated(data: bytes) -> bytes:
    return zlib.compress(data, 6)
