"""Forward passes and indicators of all layers, beside Hugging Face's ViT in PyTorch.

    python -m benchmarks.indicators [--models vit_s16,vit_b16,vit_s14@518] [--batches 1,8,32]
    python -m benchmarks.indicators --full --memory --json

Both have the same random weights. PyTorch runs its forward pass with SDPA and eagerly, and each
indicator as people get it: eager attention with `output_attentions=True`, then the same reduction.
All calls of a case take turns in one process. `ratio` is to our own forward pass, `torch_ratio` is
ours over PyTorch's for the same thing (SDPA for the forward pass), each the median over turns;
`cpu_...` are the same of the processor's time, which other programs disturb less.
`temporary_mib` is what our compiler says it allocates beside weights, images and maps, and
`memory_ratio` that over the forward pass, or over forward and backward where gradients are needed.
`--memory` adds `peak_mib`, for both: how far a run raises the process's memory, maps included.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.models.cpu import compiler_options
from vit_interact.models.vit import ViT

# The cases of the targets, and those that end within minutes on two cores.
_FULL = (["vit_s16", "vit_b16", "vit_s14@518"], [1, 8, 32])
_SHORT = (["vit_s16"], [1, 8])
FORWARD, _EAGER, _BACKWARD = "forward", "forward, eager", "forward + backward"


class Case(NamedTuple):
    """One model and batch, with the same weights on both sides.

    Attributes:
      ours: calls of our compiled programs, by row.
      memory: their temporary MiB.
      theirs: calls of PyTorch, by row; empty without it.
    """

    ours: dict[str, Callable[[], Any]]
    memory: dict[str, float]
    theirs: dict[str, Callable[[], Any]]


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=7)
    parser.add_argument("--full", action="store_true", help="all cases of the targets")
    parser.add_argument("--models", type=lambda text: text.split(","), help="NAME or NAME@PIXELS")
    parser.add_argument("--batches", type=common.numbers)
    parser.add_argument("--indicators", type=common.some_of(tuple(vx.INDICATORS)),
                        default=list(vx.INDICATORS))  # fmt: skip
    parser.add_argument("--dtype", default="float32")
    common.add_no_peer(parser)
    parser.add_argument("--peer-forward", action="store_true",
                        help="of PyTorch the forward pass alone: its weights of all layers may not "
                        "fit into memory")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="peaks, in processes of their own")
    common.add_measure(parser)
    parser.add_argument("--peaks-of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    models, batches = _FULL if options.full else _SHORT
    models, batches = options.models or models, options.batches or batches
    peer = common.has_peer(options)
    of_peer = [] if options.peer_forward else options.indicators
    arguments = dict(options.measure)
    given = options.indicators, options.dtype, of_peer if peer else None, arguments
    if options.peaks_of:
        case = make_case(models[0], batches[0], *given)
        print(
            json.dumps(
                {name: _peak(call) for name, call in getattr(case, options.peaks_of).items()}
            )
        )
        return
    fixed = {"dtype": options.dtype, "layers": "all", "measure": arguments or "defaults"}
    report = common.Report("indicators", fixed, ("torch", "transformers"))
    for name in models:
        for batch in batches:
            case = make_case(name, batch, *given)
            rows = compare(case, batch, options.repeats)
            if options.memory:
                _add_peaks(rows, name, batch, options, peer)
            for row in rows:
                report.add(model=name, batch=batch, **row)
    report.show(options.json)


def make_case(
    name: str,
    batch: int,
    indicators: list[str],
    dtype: str,
    of_peer: list[str] | None,
    arguments: dict[str, Any],
) -> Case:
    """Compiles our programs and prepares PyTorch's calls.

    Args:
      name: of a model, with `@PIXELS` for another size than its own.
      batch: images.
      indicators: to measure.
      dtype: our compute type; PyTorch's follows.
      of_peer: indicators that PyTorch measures, too; None without it.
      arguments: further ones of `vi.measure`.
    """
    name, _, pixels = name.partition("@")
    size: dict[str, Any] = {"image_size": int(pixels)} if pixels else {}
    model = vi.create_model(name, dtype=dtype, **size)
    shape = (batch, *model.config.image_size, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs: dict[str, Callable[[], Any]] = {}
    if of_peer is not None:
        model, params, theirs = _with_peer(model, images, of_peer, dtype)
    else:
        params = common.random_params(model)
    return Case(*_ours(model, params, jnp.asarray(images), indicators, arguments), theirs)


def _ours(
    model: ViT, params: Any, images: jax.Array, indicators: list[str], arguments: dict[str, Any]
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    calls, memory = {}, {}
    told = compiler_options(model, len(images))
    for name, function in programs(model, indicators, arguments).items():
        compiled = jax.jit(function, compiler_options=told).lower(params, images).compile()
        memory[name] = common.temporary_mib(compiled)
        calls[name] = functools.partial(compiled, params, images)
    return calls, memory


def programs(
    model: ViT, indicators: list[str], arguments: dict[str, Any]
) -> dict[str, Callable[..., Any]]:
    """Functions of parameters and images: forward, each indicator, and what it is compared to."""

    def backward(params: Any, images: Any) -> Any:
        def score(images: Any) -> Any:
            logits: Any = model.apply({"params": params}, images)
            return logits.max(-1).sum()

        return jax.grad(score)(images)

    functions: dict[str, Callable[..., Any]] = {
        FORWARD: lambda params, images: model.apply({"params": params}, images),
    }
    if any(map(_is_graded, indicators)):
        functions[_BACKWARD] = backward
    for name in indicators:
        functions[name] = lambda params, images, name=name: vi.measure(
            model, params, images, (name,), **arguments
        )[name]
    return functions


def _with_peer(
    model: ViT, images: np.ndarray, indicators: list[str], dtype: str
) -> tuple[ViT, Any, dict[str, Callable[[], Any]]]:
    """A Hugging Face model, and ours with its weights, read from its file."""
    import torch

    from benchmarks import torch_route

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peer = torch_route.build(model.config)
    with tempfile.TemporaryDirectory() as folder:
        torch_route.save(peer, Path(folder))
        loaded = vi.load_checkpoint(folder, dtype=dtype)
    peer = peer.to(getattr(torch, dtype)).to(torch_route.where())
    pixels = torch_route.to_torch(images).to(getattr(torch, dtype))
    calls = {
        FORWARD: torch_route.forward(peer, pixels, "sdpa"),
        _EAGER: torch_route.forward(peer, pixels, "eager"),
    }
    for name in indicators:
        calls[name] = torch_route.measure(peer, pixels, name)
    return loaded.model, loaded.params, calls


def compare(case: Case, batch: int, repeats: int) -> list[common.Row]:
    """Rows of one case."""
    both: dict[str, Callable[[], Any]] = {}
    for name in dict.fromkeys([*case.ours, *case.theirs]):
        both |= {f"ours {name}": case.ours[name]} if name in case.ours else {}
        both |= {f"theirs {name}": case.theirs[name]} if name in case.theirs else {}
    # OpenMP's threads stay awake for a while, and would take cores from ours.
    times = common.take_turns(both, repeats, pause=0.02 if case.theirs else 0)
    base, rows = times[f"ours {FORWARD}"], []
    for name in dict.fromkeys([*case.ours, *case.theirs]):
        ours, theirs = times.get(f"ours {name}"), times.get(f"theirs {name}")
        row: common.Row = {"what": name}
        if ours:
            row |= {
                "images_s": batch / ours.seconds,
                "ratio": ours.ratio(base),
                "cpu_ratio": ours.cpu_ratio(base),
            }
        if theirs:
            row["torch_images_s"] = batch / theirs.seconds
        if ours and theirs:
            row |= {
                "torch_ratio": ours.ratio(theirs),
                "cpu_torch_ratio": ours.cpu_ratio(theirs),
                "difference": _difference(case.ours[name](), case.theirs[name]()),
            }
        if name in case.memory:
            own = case.memory[_BACKWARD if _is_graded(name) else FORWARD]
            row |= {
                "temporary_mib": case.memory[name],
                "memory_ratio": case.memory[name] / own,
            }
        rows.append(row)
    return rows


def _is_graded(name: str) -> bool:
    return "output_grad" in vx.NEEDS.get(name, ())


def _difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the largest value: both must compute the same thing."""
    expected = theirs.float().cpu().numpy()
    return float(np.abs(np.asarray(ours, np.float32) - expected).max() / np.abs(expected).max())


def _add_peaks(
    rows: list[common.Row], name: str, batch: int, options: argparse.Namespace, peer: bool
) -> None:
    """Adds what a process of its own measured for each side."""
    for side, column in (("ours", "peak_mib"), ("theirs", "torch_peak_mib")):
        if side == "theirs" and not peer:
            continue
        command = [
            sys.executable, "-m", "benchmarks.indicators", "--peaks-of", side, "--models", name,
            "--batches", str(batch), "--indicators", ",".join(options.indicators),
            "--dtype", options.dtype,
            *(f"--measure={key}={value!r}" for key, value in options.measure),
            *(["--no-peer"] if options.no_peer else []),
            *(["--peer-forward"] if options.peer_forward else []),
        ]  # fmt: skip
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        for row in rows:
            row[column] = found.get(row["what"])


def _peak(call: Callable[[], Any]) -> float:
    """MiB by which a call raises the process's resident memory at its highest (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = _status()["VmRSS"]
    result = call()
    jax.block_until_ready(result)
    return (_status()["VmHWM"] - before) / 1024


def _status() -> Mapping[str, int]:
    text = Path("/proc/self/status").read_text()
    return {name: int(value) for name, value in re.findall(r"(Vm\w+):\s+(\d+) kB", text)}


if __name__ == "__main__":
    main()
