"""Shared fixtures. Types and shapes of every function are enforced while tests run."""

import gc
import importlib.metadata
import os
import pathlib

# Before jax starts: eight devices, so that sharded code is really sharded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing is left in the home of who runs the tests.
os.environ.setdefault("VIT_INTERACT_COMPILE_CACHE", "off")
# Tests compile much and compute little: without LLVM's optimisations they take half the time. What
# is asserted about memory and FLOPs is decided before LLVM. A program in one piece, and not in 32
# that threads compile, takes 7 % less where two workers have both cores anyway. A GPU's programs
# stay what they are.
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    ours = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {ours}"

from jaxtyping import install_import_hook

install_import_hook("vit_interact", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many objects and few cycles: to look for these as often as Python would takes a
# twentieth of the time.
gc.set_threshold(100_000, 20, 50)


def pytest_configure(config: pytest.Config) -> None:
    """Leaves XLA's slower emitter of CPU fusions, which users have, to the run of slow tests.

    It decides how a fusion is written, not what is fused, and takes more than a third of the time.
    XLA reads its flags when the first program is compiled. Later jaxlibs have no such flag, and
    earlier ones round some sums otherwise with it. Tests to the last bit are slow ones, therefore.
    """
    version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
    cpu = os.environ["JAX_PLATFORMS"] == "cpu"
    if cpu and config.option.markexpr != "slow" and (0, 10) <= version < (0, 11):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="session")
def development_data() -> pathlib.Path:
    """The development data, which lies beside the repository on some machines only."""
    folder = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the development data is not at {folder}")
    return folder
