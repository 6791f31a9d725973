"""How many images of a batch to work on at a time: time and memory of all layers.

    python -m benchmarks.together [--sizes vit_s16x32] [--together 32,16,8,4,1] [--json]

Sizes are NAME or NAME@PIXELS, x images. `forward` is a loop over groups of images around the
model, the others are `vi.measure`, which on one CPU chooses the number itself (`chosen`). The calls
of a size take turns in one process; `ratio` is to all images at once, `cpu_ratio` the same of the
processor's time. `temporary_mib` is what the compiler says it allocates beside weights, images and
maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import vit_interact as vi
from benchmarks import common
from vit_interact import interactions as vx
from vit_interact.models.blocks import map_images
from vit_interact.models.cpu import compiler_options
from vit_interact.observe import measure
from vit_interact.observe.ways import images_together

SIZES = ("vit_s16x32", "vit_s14@518x4")
FORWARD = "forward"


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=3)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("--together", type=common.numbers, default=[32, 16, 8, 4, 1])
    parser.add_argument("--indicators", type=common.some_of(tuple(vx.INDICATORS)),
                        default=["leave_one_out", "gradient"])  # fmt: skip
    options = parser.parse_args()
    report = common.Report("together", {"dtype": "float32", "layers": "all"})
    for size in options.sizes:
        name, _, images = size.rpartition("x")
        for row in rows_of(name, int(images), options):
            report.add(model=name, images=int(images), **row)
    report.show(options.json)


def rows_of(name: str, images: int, options: Any) -> list[common.Row]:
    """Rows of one model and batch."""
    name, _, pixels = name.partition("@")
    model = vi.create_model(name, **({"image_size": int(pixels)} if pixels else {}))
    params = common.random_params(model)
    shape = (images, *model.config.image_size, 3)
    batch = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    together = [images, *(count for count in options.together if count < images)]
    keys = [(what, count) for what in (FORWARD, *options.indicators) for count in together]
    programs = {}
    for what, count in keys:
        # The number is read while the program is traced.
        with mock.patch.object(measure, "images_together", lambda *_, count=count: count):
            told = compiler_options(model, count)
            function = jax.jit(_program(model, what, count), compiler_options=told)
            programs[what, count] = function.lower(params, batch).compile()
    calls: dict[str, Callable[[], Any]] = {
        str(key): lambda program=program: program(params, batch)
        for key, program in programs.items()
    }
    times = common.take_turns(calls, options.repeats)
    chosen = images_together(model, images, None, None, None)
    rows: list[common.Row] = []
    for what, count in keys:
        own, base = times[str((what, count))], times[str((what, images))]
        rows.append({
            "what": what, "together": count, "ms_image": 1000 * own.seconds / images,
            "ratio": own.ratio(base), "cpu_ratio": own.cpu_ratio(base),
            "temporary_mib": common.temporary_mib(programs[what, count]),
            "chosen": "yes" if what != FORWARD and count == chosen else "",
        })  # fmt: skip
    return rows


def _program(model: Any, what: str, together: int) -> Callable[[Any, Any], Any]:
    def forward(params: Any, images: Any) -> Any:
        return map_images(lambda some: model.apply({"params": params}, some), together, images)

    if what == FORWARD:
        return forward
    return lambda params, images: vi.measure(model, params, images, (what,))[what]


if __name__ == "__main__":
    main()
