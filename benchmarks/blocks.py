"""Time and memory of measuring in blocks of queries, by the size of the blocks.

    python -m benchmarks.blocks [--models vit_s14@518,vit_s16] [--blocks 115,229,457,1370] [--json]

All layers, one image. `block` is the argument of `vi.measure`; from the number of tokens on, all
queries of a layer are worked on at once. `chosen` is what `block=None` takes. All calls of a model
take turns in one process; `ratio` is to the forward pass, `cpu_ratio` the same of the processor's
time. `temporary_mib` is what the compiler says it allocates beside weights, images and maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vit_interact as vi
from benchmarks import common
from benchmarks.indicators import make_case
from vit_interact import interactions as vx
from vit_interact.observe.ways import query_blocks


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=5)
    parser.add_argument("--models", type=lambda text: text.split(","),
                        default=["vit_s14@518"], help="NAME or NAME@PIXELS")  # fmt: skip
    parser.add_argument("--blocks", type=common.numbers, default=[115, 229, 457, 1370])
    parser.add_argument("--indicators", type=common.some_of(tuple(vx.INDICATORS)),
                        default=["attention", "leave_one_out", "edge"])  # fmt: skip
    options = parser.parse_args()
    fixed = {"dtype": "float32", "batch": 1, "layers": "all"}
    report = common.Report("blocks", fixed)
    for name in options.models:
        for row in measure(name, options.blocks, options.indicators, options.repeats):
            report.add(model=name, **row)
    report.show(options.json)


def measure(name: str, blocks: list[int], indicators: list[str], repeats: int) -> list[common.Row]:
    """Rows of one model."""
    calls: dict[tuple[str, int | None], Callable[[], Any]] = {}
    memory: dict[tuple[str, int | None], float] = {}
    for block in blocks:
        case = make_case(name, 1, indicators, "float32", None, {"block": block})
        for what, call in case.ours.items():
            key = (what, block if what in indicators else None)
            calls.setdefault(key, call)
            memory.setdefault(key, case.memory[what])
    times = common.take_turns({str(key): call for key, call in calls.items()}, repeats)
    base = times[str(("forward", None))]
    chosen = {what: _chosen(name, what) for what in indicators}
    rows = []
    for key in calls:
        what, block = key
        row: common.Row = {"what": what, "block": block or ""}
        if block:
            row["chosen"] = "yes" if block == chosen[what] else ""
        own = times[str(key)]
        row |= {"s_image": own.seconds, "ratio": own.ratio(base), "cpu_ratio": own.cpu_ratio(base)}
        rows.append({**row, "temporary_mib": memory[key]})
    return rows


def _chosen(name: str, what: str) -> int:
    """Queries at a time that `block=None` means."""
    model, _, pixels = name.partition("@")
    vit = vi.create_model(model, **({"image_size": int(pixels)} if pixels else {}))
    tokens = vit.config.layout.num_tokens
    blocks = query_blocks(vit, 1, None, None, (what,))
    return tokens if blocks is None else blocks.groups(tokens)[0].shape[1]


if __name__ == "__main__":
    main()
