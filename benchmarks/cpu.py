"""What each thing that is done for CPUs is worth: passes and pieces of them with it and without.

    python -m benchmarks.cpu [--batch 128] [--repeats 7] [--json]
    taskset -c 0 python -m benchmarks.cpu    # the same on one core

Passes, float32: training the small ViT of configs/cifar10_cpu.py (`--batch` images) and ViT-Ti/16
at 112 pixels (32 images), and ViT-S/16 forward at 224 pixels (8 images), as they are and with one
thing taken away, by turns in one process; `ratio` is what then takes longer. So are indicators of
all layers of ViT-S/16, with YNNPACK's products in place of XLA's own. Pieces are single operations,
of the small ViT's sizes or of one image's attention, as they are and as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import vit_interact as vi
from benchmarks import common
from benchmarks.indicators import FORWARD, programs
from vit_interact.heap import keep_freed_memory
from vit_interact.models import dense, elementwise, vit
from vit_interact.models.attend import explicit_attention
from vit_interact.models.config import ViTConfig
from vit_interact.models.cpu import compiler_options
from vit_interact.models.dense import PatchEmbedding
from vit_interact.models.elementwise import ACTIVATION_FUNCTIONS
from vit_interact.models.vit import ViT

SMALL = ViTConfig(
    image_size=(32, 32), patch_size=(4, 4), width=128, depth=6, heads=4, mlp_dim=512, num_classes=10
)
AXES = "tokens and heads in axes of their own"
DERIVATIVES = "derivatives of GELU and LayerNorm as JAX makes them"


def without() -> dict[str, list[AbstractContextManager[Any]]]:
    """By name, what takes one thing away while a program is traced."""
    axes = mock.patch.object(dense, "dense", _in_their_axes)
    plain = {name: function.__wrapped__.fun for name, function in ACTIVATION_FUNCTIONS.items()}  # type: ignore[attr-defined]
    kept = [
        mock.patch.dict(ACTIVATION_FUNCTIONS, plain),
        mock.patch.object(elementwise, "standardise", elementwise._standardise.fun),
    ]
    erfc = mock.patch.dict(ACTIVATION_FUNCTIONS, gelu=lambda x: nn.gelu(x, approximate=False))
    fused = mock.patch.object(vit, "computed_once", lambda x: x)
    return {
        "as it is": [],
        AXES: [axes],
        "GELU by erfc": [erfc],
        "residual stream's derivative in each layer again": [fused],
        DERIVATIVES: kept,
        "without these four": [axes, *kept, erfc, fused],
    }


def _in_their_axes(x: Array, kernel: Array, bias: Array | None, axes: int) -> Array:
    """`dense.dense` of arrays as they are."""
    last, first = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    product = lax.dot_general(x, kernel, ((last, first), ((), ())))
    return product if bias is None else product + bias


def _pass(model: ViT, training: bool) -> Callable[..., Any]:
    """The forward pass, or a loss's gradient."""
    if not training:
        return lambda params, x: model.apply({"params": params}, x)
    return jax.grad(lambda params, x: jnp.sum(jnp.square(model.apply({"params": params}, x))))


def _returning(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with glibc's own settings, from a heap that has been given back."""
    libc = ctypes.CDLL(None)

    def run() -> Any:
        # M_MMAP_MAX and M_TRIM_THRESHOLD as glibc starts with.
        libc.mallopt(-4, 65536)
        libc.mallopt(-1, 128 * 1024)
        libc.malloc_trim(0)
        found = jax.block_until_ready(call())
        keep_freed_memory()
        return found

    return run


def measure(model: ViT, batch: int, training: bool, repeats: int) -> list[common.Row]:
    """The rows of one pass."""
    pixels = np.random.default_rng(0).normal(size=(batch, *model.config.image_size, 3))
    x = jnp.asarray(pixels, "float32")
    params = jax.jit(model.init)(jax.random.key(0), x[:1])["params"]
    calls: dict[str, Callable[[], Any]] = {}
    for name, changes in without().items():
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            # A function of its own: jit would not trace one twice.
            compiled = jax.jit(_pass(model, training)).lower(params, x).compile()
        calls[name] = lambda compiled=compiled: compiled(params, x)
    # A call's memory is free some time after its result: a call at once would want more.
    rows = _rows(common.take_turns(calls, repeats, pause=0.1), "as it is")
    if keep_freed_memory():  # else it is not glibc's allocator
        call = calls["as it is"]
        calls = {"as it is": call, "memory given back after each pass": _returning(call), "": call}
        rows.append(_rows(common.take_turns(calls, repeats, pause=0.1), "as it is")[1])
    return rows


def _rows(times: dict[str, common.Times], first: str) -> list[common.Row]:
    """A row for each time, with its ratio to the first."""
    base = times[first]
    return [
        {
            "what": name,
            "ms": 1e3 * own.seconds,
            "cpu_ms": 1e3 * own.cpu_seconds,
            "ratio": own.ratio(base),
            "cpu_ratio": own.cpu_ratio(base),
        }
        for name, own in times.items()
    ]


def products(model: ViT, batch: int, repeats: int) -> list[common.Row]:
    """Rows of measuring with XLA's own matrix products and with YNNPACK's; none if not told."""
    pixels = np.random.default_rng(0).normal(size=(batch, *model.config.image_size, 3))
    images, params = jnp.asarray(pixels, "float32"), common.random_params(model)
    own, rows = compiler_options(model, batch), []
    if not own:
        return rows
    measured = programs(model, ["attention", "leave_one_out", "gradient"], {})
    for name in (FORWARD, "attention", "leave_one_out", "gradient"):
        calls: dict[str, Callable[[], Any]] = {}
        for way, options in {"as it is": own, "YNNPACK's products": {}}.items():
            jitted = jax.jit(measured[name], compiler_options=options)
            calls[way] = functools.partial(jitted.lower(params, images).compile(), params, images)
        found = _rows(common.take_turns(calls, repeats), "as it is")
        rows += [{"pass": f"ViT-S/16, {name}", "batch": batch, **row} for row in found]
    return rows


def pieces(batch: int, pixels: int, repeats: int) -> list[common.Row]:
    """Rows of single operations, each as it is first and then as it was."""
    rng = np.random.default_rng(0)
    tokens, width, hidden = batch * SMALL.layout.num_tokens, SMALL.width, SMALL.mlp_dim

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), "float32")

    def of_kernel(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: x @ kernel, jnp.zeros((x.shape[-1], g.shape[-1])))[1](g)[0]

    wide, narrow, gelu = array(tokens, hidden), array(tokens, width), array(tokens, hidden)
    images = (batch, SMALL.layout.num_tokens)
    product = lambda a, b: jnp.sum(a * b, axis=-1)  # noqa: E731
    one = array(6, 197, 197), array(6, 197, 197)
    two_axes = [a.reshape(*images, -1) for a in (narrow, wide)]
    patches = _patches(array, 8, pixels)
    cases: dict[str, list[tuple[str, Callable[..., Any], tuple[Any, ...]]]] = {
        "derivative of a kernel": [
            ("tokens in one axis", of_kernel, (narrow, wide)),
            ("tokens in two axes", of_kernel, tuple(two_axes)),
        ],
        "exact GELU": [
            ("by erf", ACTIVATION_FUNCTIONS["gelu"], (gelu,)),
            ("by erfc", lambda x: nn.gelu(x, approximate=False), (gelu,)),
        ],
        "attention, 8 x 6 x 197": _attention(array, 8, 197),
        "attention, 1 x 6 x 1370": _attention(array, 1, 1370),
        "sum of a product": [
            ("[6, 197, 197]", product, one),
            ("[1, 6, 197, 197]", product, tuple(a[None] for a in one)),
        ],
        **patches,
    }
    rows = []
    for piece, ways in cases.items():
        calls: dict[str, Callable[[], Any]] = {}
        for name, function, arguments in ways:
            compiled = jax.jit(function).lower(*arguments).compile()
            calls[name] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
        # Most pieces take milliseconds; a convolution's derivative does not.
        turns = repeats if piece in patches else 20 * repeats
        found = _rows(common.take_turns(calls, turns), ways[0][0])
        rows += [{"pass": piece, **row} for row in found]
    return rows


def _patches(array: Callable[..., jax.Array], batch: int, pixels: int) -> dict[str, list[Any]]:
    """Patches of ViT-S/16 as the models embed them, and by a convolution."""
    sides = array(16, 16, 3, 384), array(batch, pixels, pixels, 3)
    size = (16, 16)
    ways = {
        "one product": PatchEmbedding(384, size, use_bias=False),
        "a convolution": nn.Conv(384, size, strides=size, padding="VALID", use_bias=False),
    }

    def embed(layer: Any, kernel: jax.Array, images: jax.Array) -> jax.Array:
        return layer.apply({"params": {"kernel": kernel}}, images)

    def derivative(layer: Any, by: int, *sides: jax.Array) -> jax.Array:
        return jax.grad(lambda *x: jnp.sum(embed(layer, *x) ** 2), by)(*sides)

    functions = {
        "patches": lambda layer: functools.partial(embed, layer),
        "patches, derivative by the kernel": lambda layer: functools.partial(derivative, layer, 0),
        "patches, derivative by the images": lambda layer: functools.partial(derivative, layer, 1),
    }
    return {
        f"{piece}, {batch} x {pixels}": [(name, make(layer), sides) for name, layer in ways.items()]
        for piece, make in functions.items()
    }


def _attention(array: Callable[..., jax.Array], batch: int, tokens: int) -> list[Any]:
    """The output of a layer of ViT-S, whose softmax divides its rows or those of the weights."""
    query, key, value = (array(batch, tokens, 6, 64) for _ in range(3))

    def attend(scale_output: bool, *sides: jax.Array) -> jax.Array:
        return explicit_attention(*sides, scale_output=scale_output).output

    ways = (("output divided", True), ("weights divided", False))
    sides = (query / 8, key, value)
    return [(name, functools.partial(attend, scale), sides) for name, scale in ways]


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=7)
    parser.add_argument("--batch", type=int, default=128, help="images of the small ViT")
    parser.add_argument("--pixels", type=int, default=224, help="a side of the images of `patches`")
    options = parser.parse_args()
    report = common.Report("cpu", {"dtype": "float32"}, ("flax",))
    large = vi.create_model("vit_s16", num_classes=1000, image_size=224)
    twelve = vi.create_model("vit_ti16", num_classes=101, image_size=112)
    for name, model, batch, training in (
        ("small ViT, training", ViT(SMALL), options.batch, True),
        ("ViT-Ti/16, training", twelve, 32, True),
        ("ViT-S/16, forward", large, 8, False),
    ):
        for row in measure(model, batch, training, options.repeats):
            report.add(**{"pass": name, "batch": batch, **row})
    for batch in (4, 8):
        for row in products(large, batch, options.repeats):
            report.add(**row)
    for row in pieces(options.batch, options.pixels, options.repeats):
        report.add(**row)
    report.show(options.json)


if __name__ == "__main__":
    main()
