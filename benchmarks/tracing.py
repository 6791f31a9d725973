"""What it takes to trace a model and to hand it to the compiler, and what spares most of it.

    python -m benchmarks.tracing [--model vit_s16] [--repeats 7] [--json]

Nothing is compiled or run. Our models have programs within the program, for attention, LayerNorm,
GELU and dense layers, so that all layers share one trace of each (`each layer by itself`: without),
and compare the shapes of parameters, which Flax would trace (`parameters by Flax`). JAX's caches
are emptied before each turn. Times are of the processor; ratios, to `as it is`, are medians over
turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import vit_interact as vi
from benchmarks import common
from vit_interact.models import attention, dense, elementwise, fused, vit
from vit_interact.models.vit import ViT

AS_IT_IS, ALONE, BY_FLAX = "as it is", "each layer by itself", "parameters by Flax"


@contextlib.contextmanager
def _each_layer_by_itself() -> Iterator[None]:
    """Takes the programs within the program away."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (attention, "_attend"),
            (fused, "_fused_attention"),
            (dense, "dense"),
            (elementwise, "standardise"),
        ):
            plain = getattr(module, name).__wrapped__
            stack.enter_context(mock.patch.object(module, name, plain))
        functions = elementwise.ACTIVATION_FUNCTIONS
        plain = {name: function.__wrapped__ for name, function in functions.items()}  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.dict(functions, plain))
        yield


@contextlib.contextmanager
def _parameters_by_flax() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (dense, elementwise, vit):
            own = mock.patch.object(module, "parameter", lambda scope, *made: scope.param(*made))
            stack.enter_context(own)
        yield


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    AS_IT_IS: contextlib.nullcontext,
    ALONE: _each_layer_by_itself,
    BY_FLAX: _parameters_by_flax,
}


def programs(model: ViT) -> dict[str, Callable[[Any, Any], Any]]:
    """What is traced, by name; of parameters and images."""

    def forward(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images)

    def loss(params: Any, images: Any) -> Any:
        return jnp.sum(jnp.square(forward(params, images)))

    def measured(name: str) -> Callable[[Any, Any], Any]:
        return lambda params, images: vi.measure(model, params, images, name)

    return {
        "forward": forward,
        "loss and gradient": jax.value_and_grad(loss),
        "leave_one_out": measured("leave_one_out"),
        "gradient": measured("gradient"),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, repeats=7)
    parser.add_argument("--model", default="vit_s16", choices=vi.list_models())
    options = parser.parse_args()
    model = vi.create_model(options.model)
    images = jax.ShapeDtypeStruct((8, *model.config.image_size, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def turn(function: Callable[[Any, Any], Any], way: str) -> Callable[[], None]:
        def run() -> None:
            jax.clear_caches()
            with WAYS[way]():
                # A function of its own: jit would not trace one twice.
                jax.jit(lambda *arguments: function(*arguments)).lower(params, images)

        return run

    report = common.Report("tracing", {"model": options.model, "batch": 8})
    for name, function in programs(model).items():
        times = common.take_turns({way: turn(function, way) for way in WAYS}, options.repeats)
        for way, time in times.items():
            ratio = time.cpu_ratio(times[AS_IT_IS])
            report.add(program=name, way=way, cpu_s=time.cpu_seconds, ratio=ratio)
    report.show(options.json)


if __name__ == "__main__":
    main()
