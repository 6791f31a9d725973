"""What a GPU is asked for: indicators, windows and training, in one process.

    python -m benchmarks.gpu [--json] [--no-peer] [--minutes 5] [--parts windows,training]
        [--batch-size 1024]

One process of a few minutes, in bfloat16: XLA's and PyTorch's compilers for a GPU take most of a
benchmark's time, so that programs of a part are traced first and compiled side by side, without
XLA's search for products in Triton, which takes minutes. Compiling tries kernels on the GPU, so
that programs of a group take turns when all are ready. `ratio` is to the group's first row; `mfu`
is the matrix products over the GPU's peak, as in `benchmarks.training`. PyTorch comes last, if the
minutes are not over.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import vit_interact as vi
from benchmarks import common, indicators, training, windows_attention
from vit_interact.data.preprocess import Preprocess
from vit_interact.layout import TokenLayout
from vit_interact.models import gpu
from vit_interact.models.vit import Encoder
from vit_interact.train.alongside import Alongside
from vit_interact.train.inputs import EvalFeed, Inputs
from vit_interact.train.sharding import make_mesh
from vit_interact.train.speed import forward_flops, peak_flops, step_flops

Calls = dict[str, Callable[[], Any]]

# Model, batch and indicators; all by `vi.measure` as it chooses, and attention by XLA alone.
_MODELS = (
    ("vit_s16", 128, ("attention", "leave_one_out", "gradient", "edge")),
    ("vit_s16", 32, ("attention",)),
    ("vit_b16", 64, ("attention",)),
    ("vit_s14@518", 16, ("attention", "leave_one_out", "edge")),
)
_TRAINED = ("vit_s16", "vit_b16")
_FLAG = "--xla_gpu_enable_triton_gemm=false"
_PARTS = ("indicators", "windows", "training", "data")


def without() -> dict[str, AbstractContextManager[Any]]:
    """By name, what takes one thing away from training while a program is traced."""
    return {
        "LayerNorm and GELU by XLA": mock.patch.object(gpu, "kernels_pay", lambda *_: False),
        "an odd number of tokens": mock.patch.object(Encoder, "_wants_even", lambda *_: False),
    }


class Group:
    """Programs that take turns.

    Attributes:
      name: of the group.
      batch: images of a call.
      flops: of an image, for those programs that have an `mfu`.
      compiled: programs by row, or what will be.
      calls: by row, or what makes one of the compiled program.
    """

    def __init__(self, name: str, batch: int) -> None:
        self.name, self.batch = name, batch
        self.flops: dict[str, float] = {}
        self.compiled: dict[str, Future[Any]] = {}
        self.calls: Calls = {}

    def add(
        self,
        pool: ThreadPoolExecutor,
        what: str,
        function: Any,
        *arguments: Any,
        call: Callable[..., Callable[[], Any]] = functools.partial,
    ) -> None:
        """Traces a program now, and has it compiled meanwhile.

        Args:
          pool: compiles.
          what: the row.
          function: jitted.
          *arguments: of the function.
          call: makes the call that is timed of the compiled program and the arguments.
        """
        compiled = pool.submit(function.lower(*arguments).compile)
        print(f"traced: {self.name}, {what}", file=sys.stderr, flush=True)
        self.compiled[what] = compiled
        self.calls[what] = lambda: call(compiled.result(), *arguments)

    def finish(self) -> None:
        """Waits until all is compiled."""
        self.calls |= {what: self.calls[what]() for what in self.compiled}

    def measure(self, report: common.Report, repeats: int) -> None:
        """Adds a row for each program."""
        times = common.take_turns(self.calls, repeats)
        base, (peak, _) = next(iter(times.values())), peak_flops(1)
        for what, own in times.items():
            row: common.Row = {
                "group": self.name, "what": what, "ms": 1e3 * own.seconds,
                "images_s": self.batch / own.seconds, "ratio": own.ratio(base),
            }  # fmt: skip
            if what in self.flops:
                row["mfu"] = self.batch * self.flops[what] / own.seconds / peak
            if what in self.compiled:
                row["temporary_mib"] = common.temporary_mib(self.compiled[what].result())
            report.add(**row)


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="after which PyTorch is left out"
    )
    parser.add_argument("--parts", type=common.some_of(_PARTS), default=list(_PARTS))
    parser.add_argument("--batch-size", type=int, default=256, help="images of a training step")
    common.add_no_peer(parser)
    options = parser.parse_args()
    peer = common.has_peer(options)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"  # before jax's start
    fixed = {"dtype": "bfloat16", "XLA": _FLAG}
    report = common.Report("gpu", fixed, ("flax", "torch", "transformers"))
    pool = ThreadPoolExecutor(16)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _run(report, options, peer, pool, folder)
    finally:
        # What is measured is kept, whatever came after it.
        report.show(options.json)
        pool.shutdown(wait=False, cancel_futures=True)


def _run(
    report: common.Report, options: Any, peer: bool, pool: ThreadPoolExecutor, folder: str
) -> None:
    end = time.monotonic() + 60 * options.minutes
    makers: dict[str, Callable[..., list[Group]]] = {
        "indicators": _indicators, "windows": _windows,
        "training": functools.partial(_training, folder, options.batch_size),
    }  # fmt: skip
    groups: list[Group] = []
    for part in [part for part in makers if part in options.parts]:
        groups = makers[part](pool)
        if peer and part == "indicators":
            _add_routes(groups)
        for group in groups:
            group.finish()
        for group in groups:
            group.measure(report, options.repeats)
    if "data" in options.parts:
        _data(report, folder, options)
    for group, name in zip(groups if "training" in options.parts else (), _TRAINED, strict=False):
        if peer and time.monotonic() < end:
            _add_peer(report, group, name, options)


def _indicators(pool: ThreadPoolExecutor) -> list[Group]:
    groups = []
    for name, batch, names in _MODELS:
        name, _, pixels = name.partition("@")
        size: dict[str, Any] = {"image_size": int(pixels)} if pixels else {}
        model = vi.create_model(name, dtype="bfloat16", **size)
        width = model.config.image_size[0]
        images = jax.random.normal(jax.random.key(0), (batch, width, width, 3))
        params = common.random_params(model)
        group = Group(f"{name}, {width} pixels, batch {batch}", batch)
        group.flops[indicators.FORWARD] = forward_flops(model.config)
        some = indicators.programs(model, list(names), {})
        if len(names) == 1:
            some = {what: some[what] for what in (indicators.FORWARD, *names)}
        else:
            xla = indicators.programs(model, ["attention"], {"kernel": "xla"})
            some["attention, XLA alone"] = xla["attention"]
        for what, function in some.items():
            group.add(pool, what, jax.jit(function), params, images)
        groups.append(group)
    return groups


def _add_routes(groups: list[Group]) -> None:
    """PyTorch's way to the same maps, of a model of the same sizes."""
    import torch

    from benchmarks import torch_route

    for group, (name, batch, names) in zip(groups, _MODELS, strict=True):
        if len(names) == 1:
            continue
        name, _, pixels = name.partition("@")
        size: dict[str, Any] = {"image_size": int(pixels)} if pixels else {}
        config = vi.create_model(name, **size).config
        model = torch_route.build(config).to(torch.bfloat16).to(torch_route.where())
        images = torch.randn(batch, 3, *config.image_size).to(torch.bfloat16)
        images = images.to(torch_route.where())
        routes = {"forward, SDPA": torch_route.forward(model, images, "sdpa")}
        routes |= {one: torch_route.measure(model, images, one) for one in names}
        for what, call in routes.items():
            try:
                call()
            except Exception as error:  # of another version: nothing of ours is lost by it
                print(f"PyTorch: {what}: {error!r}", file=sys.stderr)
            else:
                group.calls[f"PyTorch: {what}"] = call


def _windows(pool: ThreadPoolExecutor) -> list[Group]:
    layout, groups = TokenLayout(64, 64), []
    for what, boxes in (
        ("a quarter of the grid", windows_attention.box_windows(layout, 0.25)),
        ("coverage 0.9", windows_attention.laplace_windows(layout, 0.9)),
    ):
        for backward in (False, True):
            options = argparse.Namespace(
                batch=8, dtype="bfloat16", backward=backward, kernel="pallas"
            )
            functions, arguments = windows_attention.programs(layout, boxes, options)
            share = windows_attention.products(layout, boxes, options)["products"]
            both = "forward and backward" if backward else "forward"
            group = Group(f"one layer, 1,024 pixels, batch 8, {both}", 8)
            group.add(pool, "flash attention", jax.jit(functions["dense"]), *arguments)
            within = f"windows of {what}, {share:.2f} of the products"
            group.add(pool, within, jax.jit(functions["windows"]), *arguments)
            groups.append(group)
    return groups


def _data(report: common.Report, folder: str, options: Any) -> None:
    """Images a second of the trainer's data path alone, for what the first model trains on."""
    name, batch = _TRAINED[0], options.batch_size
    config = training.make_config(_settings(name, batch), training.photographs(batch, folder))
    for row in training.data_path(config, repeats=3):
        report.add(group=f"data path alone, 224 pixels, batch {batch}", **row)


def _training(folder: str, batch: int, pool: ThreadPoolExecutor) -> list[Group]:
    groups, mesh = [], make_mesh()
    for name in _TRAINED:
        config = training.make_config(_settings(name, batch), training.photographs(batch, folder))
        config.augment.where, config.data.workers = "host", 0
        model = vi.create_model(name, num_classes=101, dtype="bfloat16")
        source, preprocess = Inputs(config).train, Preprocess(size=model.config.image_size)
        group = Group(f"training, {name}, 224 pixels, batch {batch}", batch)

        step, state, data, of_model = training.step_program(config, model, source, mesh, preprocess)
        group.add(pool, "step", step, state, *data, call=training.repeated)
        for less, change in ({} if groups else without()).items():
            again = jax.jit(lambda *args, step=step: step.__wrapped__(*args), donate_argnums=0)
            copy = jax.tree.map(jnp.copy, state)
            with change:
                # Or jax would find what it has traced already.
                jax.clear_caches()
                group.add(pool, f"step, {less}", again, copy, *data, call=training.repeated)
        if not groups:
            kept = config.copy_and_resolve_references()
            kept.augment.where = kept.data.cache = "device"
            program = training.step_program(kept, model, source, mesh, preprocess)
            what = "step, pictures kept, cropped and flipped on the device"
            group.add(pool, what, *program[:2], *program[2], call=training.repeated)
        group.flops = dict.fromkeys(group.compiled, step_flops(of_model))
        if not groups:
            feed = EvalFeed(source, config, mesh, preprocess)
            watched = Alongside.of(config.interactions, model, preprocess, mesh, feed)
            last = jax.tree.map(jnp.copy, state.params)

            def watch(watched: Any = watched, last: Any = last) -> Any:
                watched.begin(0, last)
                return watched.take()

            group.calls[f"indicator alongside, of {config.interactions.images} images"] = watch
            watch()  # compiles
        groups.append(group)
    return groups


def _settings(name: str, batch: int) -> argparse.Namespace:
    return argparse.Namespace(batch_size=batch, model=name, dtype="bfloat16", size=224)


def _add_peer(report: common.Report, group: Group, name: str, options: argparse.Namespace) -> None:
    """The step by turns with PyTorch's."""
    batch = options.batch_size
    config = training.make_config(_settings(name, batch), ".")
    model = vi.create_model(name, num_classes=101, dtype="bfloat16")
    pair = Group(f"{group.name}, beside PyTorch", batch)
    pair.calls = {"step": group.calls["step"], "PyTorch's": training.peer_step(model, config)}
    pair.flops = dict.fromkeys(pair.calls, step_flops(model.config))
    pair.measure(report, options.repeats)


if __name__ == "__main__":
    main()
