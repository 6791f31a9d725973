"""Training on 1, 2, 4 and 8 simulated devices and in 2 processes: is it the same, what is sent?

    python -m benchmarks.scaling [--json]                 # correctness and volume, small model
    python -m benchmarks.scaling --volume-of vit_b16      # volume of a real one, compiled only

For every strategy and number of devices one real training step runs on the same batch; `difference`
is the largest absolute one of any parameter to one device's; for two processes, of any parameter's
norm. The volume is
read from the compiled program: bytes of results of every all-reduce and all-gather, and of operands
of every reduce-scatter and all-to-all, on one device in one step. `wire_mib` is what each device
must send for them in a ring: 2(n−1)/n of an all-reduce, (n−1)/n of the others. XLA's CPU compiler
reduces whole gradients where TPU and GPU compilers scatter them, so fsdp's wire is an upper limit.
docs/scaling.md works out real machines from these figures.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact.data.preprocess import Preprocess
from vit_interact.train.config import default_config
from vit_interact.train.inputs import make_augment
from vit_interact.train.optimizer import frozen_leaves, make_optimizer, make_schedule
from vit_interact.train.sharding import batch_sharding, make_mesh, put_batch
from vit_interact.train.state import abstract_state, create_state, param_shapes
from vit_interact.train.step import Recipe, make_train_step

STRATEGIES = ("replicate", "fsdp", "tensor")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
_MESH = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*)\] \{(?P<joined>[^}]*)\}")
_LIST = re.compile(r"replica_groups=(?:\{\{(?P<first>[\d,]*)\}|\[(?P<shape>[\d,]+)\])")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
# Small enough to run eight times on one processor.
_SMALL: dict[str, Any] = {"width": 64, "depth": 3, "heads": 8, "mlp_dim": 256}


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=1)
    parser.add_argument("--devices", type=common.numbers, default=[1, 2, 4, 8])
    parser.add_argument("--strategies", type=common.some_of(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--volume-of", choices=vi.list_models(), help="compile this; run nothing")
    parser.add_argument("--batch", type=int, default=32, help="images of a step, all devices")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-processes", action="store_true", help="without two processes")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        _be_one_of_two(options)
        return
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    what = options.volume_of or f"ViT {_SMALL['width']} wide, {_SMALL['depth']} layers, 64 pixels"
    fixed = {"model": what, "batch": options.batch, "dtype": options.dtype}
    report = common.Report("scaling", fixed)
    single: Any = None
    for strategy in options.strategies:
        for count in options.devices:
            if count == 1 and strategy != options.strategies[0]:
                continue
            run = Run(strategy, jax.devices()[:count], options.batch, options.dtype,
                      options.volume_of)  # fmt: skip
            row: common.Row = {"strategy": strategy if count > 1 else "one device",
                               "devices": count, "processes": 1}  # fmt: skip
            row |= volume(run.compiled.as_text(), count)
            if not options.volume_of:
                params = jax.device_get(run.step().params)
                single = params if single is None else single
                row["difference"] = _apart(params, single)
            report.add(**row)
    if not options.volume_of and not options.no_processes:
        for strategy in options.strategies:
            found = _two_processes(strategy, options)
            found["difference"] = _apart(found.pop("norms"), _norms(single))
            report.add(strategy=strategy, devices=4, processes=2, **found)
    report.show(options.json)


class Run:
    """One step of training, compiled for a mesh."""

    def __init__(
        self, strategy: str, devices: Any, batch: int, dtype: str, name: str | None
    ) -> None:
        config = default_config()
        config.batch_size, config.optimizer.name = batch, "sgd"
        config.augment.crop, config.augment.flip = (), False
        if name is None:
            small = {**_SMALL, "image_size": 64, "dtype": dtype}
            model = vi.create_model("vit_ti16", num_classes=16, **small)
        else:
            model = vi.create_model(name, dtype=dtype)
        self.model, self.size = model, model.config.image_size
        # Tensor parallelism is for neighbours: two devices a pair, the rest splits the batch.
        self.mesh = make_mesh(strategy, model=min(2, len(devices)) if strategy == "tensor" else 0,
                              devices=devices)  # fmt: skip
        shapes = param_shapes(model)
        rule = make_optimizer(config.optimizer, make_schedule(config.schedule, 10, 10.0), shapes,
                              model.config.depth)  # fmt: skip
        recipe = Recipe(model, rule, frozen_leaves(shapes, ""), make_augment(config.augment),
                        False, Preprocess(size=self.size), 0)  # fmt: skip
        self.rule, self.running, self.batch = rule, recipe.nothing(), batch
        abstract = abstract_state(model, rule, self.mesh, False, self.running)
        self.compiled = jax.jit(make_train_step(recipe)).lower(abstract, self._shapes()).compile()

    def _shapes(self) -> dict[str, Any]:
        place = batch_sharding(self.mesh)
        return {
            key: jax.ShapeDtypeStruct((self.batch, *array.shape[1:]), array.dtype, sharding=place)
            for key, array in self._local(1).items()
        }

    def _local(self, count: int, first: int = 0) -> dict[str, np.ndarray]:
        """Images `first` to `first + count` of the one batch that all runs see."""
        generator = np.random.default_rng(0)
        pictures = generator.integers(0, 256, (self.batch, *self.size, 3), dtype=np.uint8)
        numbers = np.arange(self.batch, dtype=np.int32)
        whole = {
            "pictures": pictures,
            "sizes": np.tile(np.array(self.size, np.int32), (self.batch, 1)),
            "labels": numbers % 16,
            "mask": np.ones(self.batch, bool),
            "indices": numbers,
        }
        return {key: array[first : first + count] for key, array in whole.items()}

    def step(self) -> Any:
        """The state after one step from the same random parameters."""
        state = create_state(self.model, self.rule, self.mesh, 0, running=self.running)
        here = self.batch // jax.process_count()
        batch = put_batch(self.mesh, self._local(here, here * jax.process_index()))
        found = self.compiled(state, batch)
        return found[0] if isinstance(found, tuple) and not hasattr(found, "params") else found


def volume(text: str, devices: int) -> common.Row:
    """What a compiled program sends: MiB by kind on one device, and on the wire."""
    total: dict[str, float] = collections.defaultdict(float)
    wire = 0.0
    for line in text.splitlines():
        found = _COLLECTIVE.search(line)
        if found is None:
            continue
        kind, ways = found["kind"], _group(found["rest"], devices)
        side = "operands" if kind in ("reduce-scatter", "all-to-all") else "result"
        size = _size(found[side]) or _size(found["result"]) * ways
        total[kind] += size
        share = {"all-reduce": 2 * (ways - 1) / ways, "collective-permute": 1.0}
        wire += size * share.get(kind, (ways - 1) / ways)
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    row: common.Row = {f"{kind}_mib": total[kind] / 2**20 for kind in kinds[:3]}
    row["other_mib"] = sum(total[kind] for kind in kinds[3:]) / 2**20
    return {**row, "wire_mib": wire / 2**20}


def _size(shapes: str) -> float:
    """Bytes of all arrays in a piece of HLO."""
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shapes)
    )


def _group(text: str, devices: int) -> int:
    """Devices that one collective joins; XLA writes them in three ways."""
    if mesh := _MESH.search(text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh["axes"]))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", mesh["joined"]))
    if listed := _LIST.search(text):
        if listed["shape"]:  # [groups, members of each]
            return int(listed["shape"].split(",")[-1])
        return len(listed["first"].split(","))
    return devices


def _apart(found: Any, expected: Any) -> float:
    """Largest absolute difference of two trees."""
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in leaves)


@jax.jit
def _norms(params: Any) -> list[jax.Array]:
    """One number for each parameter, which every process of several has and can print."""
    return [jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(params)]


def _two_processes(strategy: str, options: argparse.Namespace) -> common.Row:
    """The same step in two processes of two devices each; what the first one printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.scaling", "--strategies", strategy, "--batch",
               str(options.batch), "--dtype", options.dtype, "--address", address]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen([*command, "--process", str(number)], stdout=subprocess.PIPE, text=True,
                         env=environment)
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in both]
    if any(process.returncode for process in both):
        raise SystemExit("a process of the pair failed; see above")
    return json.loads(outputs[0].splitlines()[-1])


def _be_one_of_two(options: argparse.Namespace) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(options.address, 2, options.process)
    run = Run(options.strategies[0], jax.devices(), options.batch, options.dtype, None)
    found = volume(run.compiled.as_text(), jax.device_count())
    print(json.dumps({**found, "norms": [float(norm) for norm in _norms(run.step().params)]}))


if __name__ == "__main__":
    main()
