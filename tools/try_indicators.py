"""What else was tried to make windows smaller and orders of removal better, as one table.

Every trial turns the embedded model's interactions into windows of one mean area, or into an order
in which patches go, on the same images. Top-1, agreement with the whole model and the divergence
from its classes' distribution say what is left of the prediction.

Examples:
  python tools/try_indicators.py --data caltech101/test --limit 48 --out trials.json
  python tools/try_indicators.py --limit 8 --area 0.25
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from vit_interact import interactions as vx
from vit_interact.cli.shell import progress
from vit_interact.data.sources import open_examples, read_batches
from vit_interact.interactions.controls import centred_windows
from vit_interact.verify import removal, windows
from vit_interact.verify.curves import resample, share
from vit_interact.verify.subject import Subject

# Of windows; each trial takes the one that is nearest to the wanted area.
COVERAGES = tuple(c / 100 for c in range(8, 84, 4))
NOISY = 4
# Of normalised pixels.
NOISE = 0.15


def margin(logits: jax.Array) -> jax.Array:
    """The predicted class's logit over that of the next one."""
    best = jax.lax.top_k(logits, 2)[0]
    return best[:, 0] - best[:, 1]


class Trials:
    """Compiled trials of one model."""

    def __init__(self, model: Any, params: Any, area: float, removed: float) -> None:
        self.model, self.params, self.area = model, params, area
        self.subject, self.layout = Subject.of(model), model.config.layout
        self.left = removal.patches_left(removed, self.layout)
        self.chosen: dict[str, int] = {}
        subject = self.subject

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            # Parameters are an argument: as constants they would be compiled in.
            return functools.partial(jax.jit(function), params)

        def shrink(params: Any, images: jax.Array) -> jax.Array:
            return windows.staged_windows(subject, params, images, "gradient", COVERAGES[3:-6])

        self.plain = compiled(lambda params, images: subject.apply(params, images, None))
        self.inside = compiled(functools.partial(windows.apply_windows, subject))
        self.drop = compiled(subject.drop)  # type: ignore[arg-type]
        self.shrink = compiled(shrink)

    def maps(self, name: str, images: jax.Array, score: Any = "predicted") -> jax.Array:
        """One indicator of all layers."""
        return vi.measure(self.model, self.params, images, (name,), score)[name]

    def noisy(self, images: jax.Array) -> jax.Array:
        """`gradient`, mean over noisy copies of the images."""
        classes = self.plain(images).argmax(-1)
        keys = jax.random.split(jax.random.key(0), NOISY)
        draws = [images + NOISE * jax.random.normal(key, images.shape) for key in keys]
        return sum(self.maps("gradient", draw, classes) for draw in draws) / NOISY

    def rows(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Trials of windows: images to rows `[L, B, P, P]`."""
        view = functools.partial(vx.patch_view, layout=self.layout)
        names = ("attention", "value_norm", "leave_one_out", "gradient", "edge")
        made = {name: lambda x, n=name: view(self.maps(n, x)) for name in names}
        for name in ("attention", "gradient"):
            made[f"{name}, rows to the power 0.5"] = lambda x, n=name: view(self.maps(n, x)) ** 0.5
        for name in ("leave_one_out", "gradient"):
            made[f"{name} + attention"] = lambda x, n=name: (
                view(self.maps(n, x)) + view(self.maps("attention", x))
            )
        made["gradient, mean of the layers' rows"] = lambda x: jnp.broadcast_to(
            view(self.maps("gradient", x))[:-1].mean(axis=0),
            (self.subject.depth, len(x), self.layout.num_patches, self.layout.num_patches),
        )
        made["gradient of the margin"] = lambda x: view(self.maps("gradient", x, margin))
        made[f"gradient, mean of {NOISY} noisy images"] = lambda x: view(self.noisy(x))
        return made

    def orders(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Trials of removal: images to an order `[B, P]`, the least needed patch first."""

        def by(maps: jax.Array) -> jax.Array:
            return removal.indicator_orders(maps, self.layout)["lowest"]

        def staged(sizes: list[int], images: jax.Array) -> jax.Array:
            return removal.staged_by_indicator(self.subject, self.params, images, "gradient", sizes)

        depth, patches = self.subject.depth, self.layout.num_patches
        prefix = self.layout.prefix
        row = lambda x: self.maps("gradient", x)[:, :, 0, prefix:].mean(axis=0)  # noqa: E731
        return {
            "gradient": lambda x: by(self.maps("gradient", x)),
            "gradient of the margin": lambda x: by(self.maps("gradient", x, margin)),
            f"gradient, mean of {NOISY} noisy images": lambda x: by(self.noisy(x)),
            "gradient, the class token's row": lambda x: vx.removal_order(row(x)),
            "gradient, first half of the layers": lambda x: by(
                self.maps("gradient", x)[: depth // 2]
            ),
            "gradient, second half": lambda x: by(self.maps("gradient", x)[depth // 2 :]),
            "gradient, again at 1/2": lambda x: staged([patches, patches // 2], x),
            "gradient, again at 1/2 and 1/4": lambda x: staged(
                [patches, patches // 2, patches // 4], x
            ),
            "gradient, staged": lambda x: staged(removal.stage_sizes(patches), x),
        }

    def choose(self, name: str, windows_by_coverage: jax.Array) -> jax.Array:
        """Of windows `[Q, L, B, P, 4]` those nearest to the wanted area, on the first batch."""
        if name not in self.chosen:
            areas = [self.area_of(boxes) for boxes in windows_by_coverage]
            self.chosen[name] = int(np.argmin(np.abs(np.array(areas) - self.area)))
        return windows_by_coverage[self.chosen[name]]

    def area_of(self, boxes: jax.Array) -> float:
        """Mean area over layers that can reach the logits."""
        reaching = boxes[jnp.asarray(self.subject.reaching)]
        return float(vx.window_area(reaching, self.layout).mean())

    def run(self, images: jax.Array) -> dict[str, tuple[np.ndarray, float | None]]:
        """Trial to logits, and the area of its windows."""
        found: dict[str, tuple[np.ndarray, float | None]] = {}

        def restrict(name: str, boxes: jax.Array) -> None:
            for kind, own in (("", boxes), (" (centred)", centred_windows(boxes, self.layout))):
                logits, area = self.inside(images, own)
                found[f"windows: {name}{kind}"] = np.asarray(logits), float(area.mean())

        for name, rows in self.rows().items():
            made = vx.smallest_windows(rows(images), self.layout, COVERAGES)
            restrict(name, self.choose(name, made))
        restrict("gradient, staged", self.choose("staged", self.shrink(images)))
        for name, order in self.orders().items():
            keep = removal.kept_patches(order(images), self.left)
            found[f"removal: {name}"] = np.asarray(self.drop(images, keep)), None
        return found


def main() -> None:
    """Runs all trials and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="embedded", help="as of vit-interact verify")
    parser.add_argument("--limit", type=int, default=48, help="images; default: %(default)s")
    parser.add_argument("--area", type=float, default=0.12, help="of windows; default: %(default)s")
    parser.add_argument("--removed", type=float, default=0.9, help="share; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()

    weights = vi.load_checkpoint("vit_s14_caltech101")
    names = weights.class_names
    examples, _ = open_examples(arguments.data, names, len(names), limit=arguments.limit)
    trials = Trials(weights.model, weights.params, arguments.area, arguments.removed)
    labels, whole, parts, start = [], [], [], time.perf_counter()
    batches = read_batches(examples, weights.preprocess, 8)
    with progress("trying", -(-len(examples) // 8)) as advance:
        for _, batch in batches:
            images = weights.preprocess.normalize(jnp.asarray(batch.pictures))
            labels.append(batch.labels[: batch.count])
            whole.append(np.asarray(trials.plain(images))[: batch.count])
            parts.append(
                {k: (v[: batch.count], area) for k, (v, area) in trials.run(images).items()}
            )
            advance(1)
    table = _table(np.concatenate(labels), np.concatenate(whole), parts)
    for row in table:
        area = "" if row["area"] is None else f"{100 * row['area']:5.1f}"
        print(
            f"{row['trial']:58} {area:5} top-1 {100 * row['top1']:5.1f}  "
            f"agreement {100 * row['agreement']:5.1f}  KL {row['kl']:.2f}"
        )
    if arguments.out:
        report = {
            "command": f"python tools/try_indicators.py --data {Path(arguments.data).name} "
            f"--limit {arguments.limit} --area {arguments.area} --removed {arguments.removed}",
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "images": len(examples),
            "seconds": round(time.perf_counter() - start),
            "trials": table,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _table(labels: np.ndarray, whole: np.ndarray, parts: list[Any]) -> list[dict[str, Any]]:
    weights, truth = resample(len(labels), 0), np.asarray(jax.nn.log_softmax(whole))
    rows = [_row("whole model", whole, None, labels, truth, weights)]
    for name in parts[0]:
        logits = np.concatenate([part[name][0] for part in parts])
        areas = [part[name][1] for part in parts]
        area = None if areas[0] is None else float(np.mean(areas))
        rows.append(_row(name, logits, area, labels, truth, weights))
    return rows


def _row(
    name: str, logits: np.ndarray, area: float | None, labels: np.ndarray, truth: np.ndarray,
    weights: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    guesses, log = logits.argmax(-1), np.asarray(jax.nn.log_softmax(logits))
    top1, span = share(guesses == labels, weights)
    return {
        "trial": name,
        "area": area,
        "top1": top1,
        "top1_95": span,
        "agreement": float((guesses == truth.argmax(-1)).mean()),
        "kl": float((np.exp(truth) * (truth - log)).sum(-1).mean()),
    }


if __name__ == "__main__":
    main()
