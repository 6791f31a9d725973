"""One layer of attention: the weights of a few heads at a time beside those of all heads.

    python -m benchmarks.heads [--sizes 1x577x6,8x577x6] [--at-a-time 2] [--json]

Sizes are images x tokens x heads of 64. A layer is its four projections and attention, with the map
of an indicator where one is named; `gradient` and `edge` are its backward pass. `at_a_time` is
what `vi.measure` takes on a CPU where it takes heads apart (docs/kernels.md), if not given. All
heads at once means blocks of queries where their weights would be many. Figures are the time of a
few heads over that of all, the median over turns in one process; `cpu_...` of the processor's time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from vit_interact.models.attend import (
    QueryBlocks,
    attend_in_blocks,
    blocks_over_heads,
    suitable_blocks,
)
from vit_interact.models.attend_backward import gradients_in_blocks
from vit_interact.observe.maps import Maps, needs_backward

WIDTH = 64
SIZES = ("1x257x6", "8x257x6", "1x577x6", "1x577x12", "8x577x6", "1x1025x6", "1x1370x6")
FORWARD = "forward"
WHAT = (FORWARD, "attention", "leave_one_out", "gradient", "edge")

Layer = Callable[..., tuple[jax.Array, ...]]


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=19)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("--at-a-time", type=int, help="heads; a divisor of their number")
    options = parser.parse_args()
    report = common.Report("heads", {"dtype": "float32", "head_width": WIDTH})
    for size in options.sizes:
        images, tokens, heads = map(int, size.split("x"))
        report.add(**measure(images, tokens, heads, options.at_a_time, options.repeats))
    report.show(options.json)


def measure(
    images: int, tokens: int, heads: int, at_a_time: int | None, repeats: int
) -> common.Row:
    """The row of one size."""
    shape = (images, heads, tokens, tokens)
    together = suitable_blocks(*shape) or QueryBlocks(tokens)
    apart = blocks_over_heads(*shape)
    apart = dataclasses.replace(apart, heads=at_a_time or apart.heads)
    arguments = make_arguments(images, tokens, heads)
    calls = {
        (what, blocks): functools.partial(
            jax.jit(layer(what, blocks)).lower(*arguments).compile(), *arguments
        )
        for what in WHAT
        for blocks in (together, apart)
    }
    times = common.take_turns({str(key): call for key, call in calls.items()}, repeats)
    row: common.Row = {
        "images": images, "tokens": tokens, "heads": heads, "at_a_time": apart.heads
    }  # fmt: skip
    for what in WHAT:
        ours, base = (times[str((what, blocks))] for blocks in (apart, together))
        row |= {what: ours.ratio(base), f"cpu_{what}": ours.cpu_ratio(base)}
    return row


def make_arguments(images: int, tokens: int, heads: int) -> tuple[Any, ...]:
    """Tokens, kernels of query, key and value, the output's, each head's output, its gradient."""
    rng, width = np.random.default_rng(0), heads * WIDTH
    shapes = (
        ((images, tokens, width), 1.0),
        ((3, width, width), width**-0.5),
        ((heads, WIDTH, width), 0.05),
        ((images, tokens, heads, WIDTH), 1.0),
        ((images, tokens, heads, WIDTH), 1.0),
    )
    return tuple(jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s, scale in shapes)


def layer(what: str, blocks: QueryBlocks) -> Layer:
    """A layer's pass, forward or backward as the indicator needs, and its map."""
    reduce = None if what == FORWARD else Maps((what,))
    backward = reduce is not None and needs_backward(what)

    def run(x: Any, kernels: Any, out_kernel: Any, output: Any, grad: Any) -> tuple[Any, ...]:
        shape, width = output.shape, x.shape[-1]
        # In a model biases follow: products of matrices, and then what is elementwise.
        query, key, value = (((flat(x) @ kernel) + 0.1).reshape(shape) for kernel in kernels)
        inputs = (query / WIDTH**0.5, key, value, None, None, out_kernel)
        if not backward:
            each, maps = attend_in_blocks(inputs, blocks, reduce)
            return flat(each) @ out_kernel.reshape(width, width), *maps.values()
        assert reduce is not None
        (*sides, _), maps = gradients_in_blocks(inputs, blocks, reduce, output, grad)
        by_x = sum(flat(side) @ kernel.T for side, kernel in zip(sides, kernels, strict=True))
        return by_x, *maps.values()

    def flat(array: Any) -> Any:
        return array.reshape(array.shape[0] * array.shape[1], -1)

    return run


if __name__ == "__main__":
    main()
