"""GiB that the kernels of a training step move on a GPU, by the program, which needs no GPU.

    pip install "jax[cuda13]"    # of the version of jax that is here
    python -m benchmarks.gpu_program [--model vit_s16] [--batch-size 256] [--depth 3] [--json]

The trainer's step in bfloat16 is compiled for an H100 with two things taken away, as in
`benchmarks.gpu`. Each kernel reads its arguments and writes its results once: what products and
attention move, what all others do, and those of these that transpose. On a GPU most of these others
wait for memory, so that their bytes are their time. `--depth` keeps it to seconds; differences are
those of a layer.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

import vit_interact as vi
from benchmarks import common, training
from benchmarks.gpu import without
from vit_interact.data.preprocess import Preprocess
from vit_interact.models import fused
from vit_interact.train.inputs import Inputs
from vit_interact.train.sharding import make_mesh

# What XLA asks of a device before it compiles for one (NVIDIA's data sheet and CUDA's limits).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Autotuning would try kernels on the device.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
_PRODUCTS = re.compile("custom-call|cublas|dot_product_attention|gemm")


class Kernel(NamedTuple):
    """A kernel of a program and what it reads and writes."""

    name: str
    gib: float


def kernels(text: str) -> list[Kernel]:
    """Kernels of an optimised program's entry."""
    shapes: dict[str, str] = {}
    found = []
    for line in text[text.index("\nENTRY") :].splitlines()[1:]:
        parts = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if not parts:
            continue
        name, shape, operation, rest = parts.groups()
        # A product's scratch space is no result.
        shapes[name] = re.sub(r"s8\[\d+\]", "", shape)
        if operation not in _FREE:
            arguments = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
            moved = [shapes[name], *(shapes.get(one, "") for one in arguments)]
            found.append(Kernel(name, sum(map(_bytes, moved)) / 2**30))
    return found


def _bytes(shape: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        _WIDTHS.get(kind, 8) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in arrays
    )


def _device() -> Any:
    """An H100 to compile for."""
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            "h100", platform="cuda", target_config=_H100, topology="1x1x1"
        )
    except Exception as error:  # jax has several kinds for this
        sys.exit(f'no compiler for GPUs: pip install "jax[cuda13]=={jax.__version__}" ({error})')
    return described.devices[0]


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Has programs traced as where cuDNN is."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (jax, "default_backend", "gpu"),
            (fused, "cudnn_knows", True),
            (cudnn, "check_cudnn_version", 91200),
            (cudnn, "check_compute_capability", True),
        ):
            stack.enter_context(mock.patch.object(module, name, mock.Mock(return_value=value)))
        yield


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=1)
    parser.add_argument("--model", default="vit_s16")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3, help="layers")
    options = parser.parse_args()
    place = jax.sharding.SingleDeviceSharding(_device())
    fixed = {"model": options.model, "batch": options.batch_size, "depth": options.depth,
             "dtype": "bfloat16", "for": "NVIDIA H100"}  # fmt: skip
    report = common.Report("gpu_program", fixed, ("flax", "jax-cuda13-plugin"))
    settings = argparse.Namespace(dtype="bfloat16", size=224, **vars(options))
    with tempfile.TemporaryDirectory() as folder:
        config = training.make_config(settings, training.photographs(options.batch_size, folder))
        config.augment.where, config.data.workers = "host", 0
        model = vi.create_model(
            options.model, num_classes=101, dtype="bfloat16", depth=options.depth
        )
        step, state, data, _ = training.step_program(
            config, model, Inputs(config).train, make_mesh(), Preprocess(model.config.image_size)
        )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=place),
        (state, *data),
    )
    for name, change in {"as it is": contextlib.nullcontext(), **without()}.items():
        with change, _as_on_a_gpu():
            jax.clear_caches()
            again = jax.jit(lambda *args: step.__wrapped__(*args), donate_argnums=0)
            lowered = again.trace(*shapes).lower(lowering_platforms=("cuda",))
        found = kernels(lowered.compile(_OPTIONS).as_text())
        others = [one for one in found if not _PRODUCTS.match(one.name)]
        report.add(
            what=name, kernels=len(found), gib=sum(one.gib for one in found),
            others_gib=sum(one.gib for one in others),
            transposing_gib=sum(one.gib for one in others if "transpose" in one.name),
        )  # fmt: skip
    report.show(options.json)


if __name__ == "__main__":
    main()
