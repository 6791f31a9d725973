"""Both verifications of a model over a data source: in parts, over all devices, resumable."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vit_interact.data.preprocess import Preprocess
from vit_interact.data.sources import Batch, Example, read_batches
from vit_interact.interactions.views import patch_view
from vit_interact.interactions.windows import smallest_windows
from vit_interact.models.cpu import compiler_options
from vit_interact.models.vit import ViT
from vit_interact.verify import faithfulness, groups, removal, windows
from vit_interact.verify.parts import WHOLE, Parts
from vit_interact.verify.subject import Subject

TESTS = ("windows", "removal", "faithfulness")
# Forward passes that measuring costs, roughly: some indicators need a backward pass.
_MEASURING = 4.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to verify.

    Attributes:
      indicators: names of `interactions.INDICATORS`.
      tests: of `TESTS`.
      coverages: of windows.
      power: rows are raised to it before windows are made.
      variants: of `windows.VARIANTS`.
      controls: of `windows.CONTROLS`, the boxes that windows are compared with.
      orders: of `removal.ORDERS`.
      shares: of patches removed.
      interventions: of `removal.INTERVENTIONS`.
      seed: of random controls.
      batch_size: images at a time, over all devices.
    """

    indicators: tuple[str, ...]
    tests: tuple[str, ...] = TESTS[:2]
    coverages: tuple[float, ...] = windows.COVERAGES
    variants: tuple[str, ...] = windows.VARIANTS
    controls: tuple[str, ...] = windows.CONTROLS
    orders: tuple[str, ...] = removal.ORDERS
    shares: tuple[float, ...] = removal.SHARES
    interventions: tuple[str, ...] = removal.INTERVENTIONS
    seed: int = 0
    batch_size: int = 8
    power: float = 1.0

    def parts(self) -> Iterator[tuple[str, str]]:
        """(test, whose windows or orders) of every part of a batch."""
        yield "base", "model"
        if "windows" in self.tests:
            yield from (("windows", name) for name in self.indicators)
            if "data" in self.variants:
                yield "average", "model"
                yield from (("data", name) for name in self.indicators)
        if "removal" in self.tests:
            yield from (("removal", name) for name in (*self.indicators, "controls"))
        if "faithfulness" in self.tests:
            yield "edges", "model"
            yield from (("groups", name) for name in self.indicators)

    def passes(self, test: str, name: str, subject: Subject) -> float:
        """Forward passes of a part, in units of a whole one; shortened sequences count less."""
        if test == "base":
            return 1.0
        if test == "edges":
            # Cut edges run through half of the layers in float64, which takes twice as long.
            cuts = faithfulness.PER_LAYER * subject.depth
            return cuts + (subject.depth + 2) * _MEASURING
        if test == "groups":
            return _MEASURING + 1 + len(groups.KINDS) * len(groups.SHARES)
        if test == "average":
            return _MEASURING * len(self.indicators) / 2
        if test == "data":
            return float(len(self.coverages))
        if test == "windows":
            own = sum(variant in windows.CONTROLLED for variant in self.variants)
            each = own * (1 + len(self.controls)) + ("shared" in self.variants)
            measured = 1.0
            if "staged" in self.variants:
                measured += 1 + max(windows.stages_of(c)[0] for c in self.coverages)
            return _MEASURING * measured + len(self.coverages) * each
        staged = "staged" in self.orders
        orders = len(self.orders)
        if name == "controls":
            staged = staged and subject.class_token
            orders = removal.RANDOM_ORDERS + 2 * subject.class_token + staged
        patches = subject.layout.num_patches
        measuring = _MEASURING * (1 + staged * sum(removal.stage_sizes(patches)) / patches)
        each = sum(
            sum((1 - share) if how == "drop" else 1 for share in self.shares)
            for how in self.interventions
        )
        return float(measuring + orders * each)


class Programs:
    """Compiled functions of one subject: one program for each static shape."""

    def __init__(
        self,
        subject: Subject,
        params: Any,
        preprocess: Preprocess,
        plan: Plan,
        devices: Sequence[jax.Device] | None = None,
        model: ViT | None = None,
    ) -> None:
        """Places the parameters on devices, by default all local ones.

        Raises:
          ValueError: when a batch does not divide over the devices, patches cannot be dropped, or
            faithfulness is asked of a model that is not ours.
        """
        devices = list(devices or jax.local_devices())
        if "removal" in plan.tests and "drop" in plan.interventions and subject.drop is None:
            raise ValueError("this model has no way to drop patches: leave out that intervention")
        if "removal" in plan.tests and "staged" in plan.orders and subject.measure_kept is None:
            raise ValueError("this model cannot be measured on some patches: leave out staged")
        if "windows" in plan.tests and "staged" in plan.variants and subject.measure_inside is None:
            raise ValueError("this model cannot be measured inside windows: leave out staged")
        if plan.batch_size % len(devices):
            raise ValueError(
                f"batch size {plan.batch_size} does not divide over {len(devices)} devices"
            )
        if "faithfulness" in plan.tests and model is None:
            raise ValueError("faithfulness needs vit_interact's ViT, whose edges can be cut")
        self.subject, self.plan, self.model = subject, plan, model
        self.mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        self.params = jax.device_put(params, NamedSharding(self.mesh, P()))
        self._normalize = preprocess.normalize
        layout, seed = subject.layout, plan.seed

        def keys_of(numbers: Array) -> Array:
            return jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)

        def base(params: Any, pictures: Array) -> Array:
            return subject.apply(params, self._normalize(pictures), None).argmax(-1)

        def make(params: Any, pictures: Array, numbers: Array, name: str) -> Any:
            return windows.measure_windows(
                subject, params, self._normalize(pictures), name, plan.coverages,
                keys_of(numbers), plan.variants, plan.controls, plan.power,
            )  # fmt: skip

        def restricted(params: Any, pictures: Array, boxes: Array) -> tuple[Array, Array]:
            logits, area = windows.apply_windows(subject, params, self._normalize(pictures), boxes)
            return logits.argmax(-1), area

        def orders(params: Any, pictures: Array, numbers: Array, name: str) -> Any:
            images = self._normalize(pictures)
            measured = "attention" if name == "controls" else name
            maps = subject.measure(params, images, (measured,))[measured]
            staged = "staged" in plan.orders
            if name == "controls":
                found = removal.control_orders(maps, subject, keys_of(numbers))
                if staged and subject.class_token:
                    again = removal.staged_by_class_attention(subject, params, images)
                    found["class_attention_staged"] = again
                return found
            found = removal.indicator_orders(maps, layout, name == "rollout")
            if staged:
                found["staged"] = removal.staged_by_indicator(subject, params, images, name)
            return {order: found[order] for order in plan.orders}

        def dropped(params: Any, pictures: Array, order: Array, count: int) -> Array:
            assert subject.drop is not None
            keep = removal.kept_patches(order, count)
            return subject.drop(params, self._normalize(pictures), keep).argmax(-1)

        def masked(params: Any, pictures: Array, order: Array, count: Array) -> Array:
            hidden = removal.hidden_patches(order, count)
            images = self._normalize(pictures)
            return removal.apply_mask(subject, params, images, hidden).argmax(-1)

        def zeroed(params: Any, pictures: Array, order: Array, count: Array) -> Array:
            hidden = removal.hidden_patches(order, count)
            images = self._normalize(pictures)
            return removal.apply_zero(subject, params, images, hidden).argmax(-1)

        def views(params: Any, pictures: Array, real: Array) -> Array:
            maps = subject.measure(params, self._normalize(pictures), plan.indicators)
            rows = jnp.stack([patch_view(maps[name], layout) for name in plan.indicators])
            return jax.lax.psum(jnp.einsum("ilbpq,b->ilpq", rows, real), "data")

        images, layered = P("data"), P(None, None, "data")
        self.compiled: list[Any] = []
        self.base = self._split(base, (images,), images)
        self.make = self._split(make, (images, images), layered, static=True)
        self.restricted = self._split(restricted, (images, P(None, "data")), images)
        self.views = self._split(views, (images, images), P())
        self.orders = self._split(orders, (images, images), images, static=True)
        self.dropped = self._split(dropped, (images, images), images, static=True)
        self.masked = self._split(masked, (images, images, P()), images)
        self.zeroed = self._split(zeroed, (images, images, P()), images)

    def _split(
        self, function: Callable[..., Any], ins: tuple[P, ...], outs: P, static: bool = False
    ) -> Callable[..., Any]:
        """Jits a function of (params, *arrays[, static]) with images split over devices.

        Each device searches the windows of its own images: `shard_map` and not only shardings, so
        that loops over images stay local.
        """

        def call(params: Any, *arguments: Any) -> Any:
            arrays = arguments[:-1] if static else arguments
            rest = arguments[-1:] if static else ()
            local = lambda params, *arrays: function(params, *arrays, *rest)  # noqa: E731
            mapped = jax.shard_map(
                local, mesh=self.mesh, in_specs=(P(), *ins), out_specs=outs, check_vma=False
            )
            return mapped(params, *arrays)

        compiled = jax.jit(
            call,
            static_argnums=(len(ins) + 1,) if static else (),
            compiler_options=compiler_options(self.model, self.plan.batch_size // self.mesh.size),
        )
        self.compiled.append(compiled)
        return lambda *arguments: compiled(self.params, *arguments)

    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(one._cache_size() for one in self.compiled)

    def put(self, batch: Batch) -> tuple[Array, Array]:
        """Pictures and keys of a batch, split over devices."""
        sharding = NamedSharding(self.mesh, P("data"))
        pictures, keys = jax.device_put((batch.pictures, batch.keys), sharding)
        return pictures, keys

    def run(self, test: str, name: str, batch: Batch) -> dict[str, np.ndarray]:
        """One part: arrays whose last axis is that of images, or of edges; without padding."""
        pictures, keys = self.put(batch)
        plan, count = self.plan, batch.count
        if test == "base":
            found = {"predictions": np.asarray(self.base(pictures)), "labels": batch.labels}
        elif test == "windows":
            found = self._windows(pictures, self.make(pictures, keys, name))
        elif test == "average":
            real = (np.arange(len(batch.pictures)) < count).astype(np.float32)
            return {"views": np.asarray(self.views(pictures, real)), "images": np.asarray(count)}
        elif test == "data":
            own = self.data_windows[name]  # [Q, L, P, 4]
            shape = (*own.shape[:2], len(batch.pictures), *own.shape[2:])
            boxes = np.broadcast_to(own[:, :, None], shape)
            found = self._windows(pictures, {("data", "indicator"): boxes})
        elif test == "removal":
            found = self._removal(name, pictures, keys)
        else:
            assert self.model is not None
            ours = (self.model, self.params, self._normalize(pictures), batch.keys)
            if test == "edges":
                return faithfulness.run_edges(*ours, plan.indicators, plan.seed, count)
            found = faithfulness.run_groups(*ours, name, plan.seed)
        return {key: array[..., :count] for key, array in found.items()}

    def share_windows(self, mean: np.ndarray) -> None:
        """Makes the windows of the data set from the mean of its views `[I, L, P, P]`."""
        coverages, layout, power = self.plan.coverages, self.subject.layout, self.plan.power
        self.data_windows = {
            name: np.asarray(smallest_windows(jnp.asarray(own) ** power, layout, coverages))
            for name, own in zip(self.plan.indicators, mean, strict=True)
        }

    def _windows(
        self, pictures: Array, made: Mapping[tuple[str, str], Any]
    ) -> dict[str, np.ndarray]:
        found = {}
        split = NamedSharding(self.mesh, P(None, "data"))
        for (variant, kind), boxes in made.items():
            runs = [self.restricted(pictures, jax.device_put(one, split)) for one in boxes]
            found[f"{variant}/{kind}/predictions"] = np.stack([np.asarray(p) for p, _ in runs])
            found[f"{variant}/{kind}/area"] = np.stack([np.asarray(a) for _, a in runs])
        return found

    def _removal(self, name: str, pictures: Array, keys: Array) -> dict[str, np.ndarray]:
        found = {}
        counts = [removal.patches_left(share, self.subject.layout) for share in self.plan.shares]
        programs = {"drop": self.dropped, "mask": self.masked, "zero": self.zeroed}
        for order_name, order in self.orders(pictures, keys, name).items():
            for how in self.plan.interventions:
                runs = [programs[how](pictures, order, count) for count in counts]
                found[f"{order_name}/{how}"] = np.stack([np.asarray(run) for run in runs])
        return found


def run_parts(
    programs: Programs,
    parts: Parts,
    examples: Sequence[Example],
    preprocess: Preprocess,
    first_key: int = 0,
    advance: Callable[[float], None] = lambda passes: None,
) -> None:
    """Runs every part that is not finished.

    Args:
      programs: of the model.
      parts: where results go and where finished ones are found.
      examples: labelled images, from `open_examples`.
      preprocess: the model's.
      first_key: place of the first example in the whole order.
      advance: called with forward passes of a batch, whenever some are finished or found finished.
    """
    plan, subject = programs.plan, programs.subject

    def sweep(chosen: Sequence[tuple[str, str]]) -> None:
        todo: dict[int, list[tuple[str, str]]] = {}
        for number in range(-(-len(examples) // plan.batch_size)):
            for part in chosen:
                if parts.has(*part, number):
                    advance(plan.passes(*part, subject))
                else:
                    todo.setdefault(number, []).append(part)
        batches = read_batches(examples, preprocess, plan.batch_size, first_key, list(todo))
        for number, batch in batches:
            for part in todo[number]:
                start = time.perf_counter()
                found = programs.run(*part, batch)
                seconds = np.full(batch.count, (time.perf_counter() - start) / batch.count)
                parts.save(*part, number, {**found, "seconds": seconds})
                advance(plan.passes(*part, subject))

    sweep([part for part in plan.parts() if part[0] not in WHOLE])
    last = [part for part in plan.parts() if part[0] in WHOLE]
    if last:
        programs.share_windows(parts.average.mean())
        sweep(last)
