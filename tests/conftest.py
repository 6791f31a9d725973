"""Shared fixtures. Types and shapes of every function are enforced while tests run."""

import os
import pathlib

# Before jax starts: eight devices, so that sharded code is really sharded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing is left in the home of who runs the tests.
os.environ.setdefault("VIT_INTERACT_COMPILE_CACHE", "off")
# Tests compile much and compute little: without LLVM's optimisations they take half the time. What
# is asserted about memory and FLOPs is decided before LLVM.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook

install_import_hook("vit_interact", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def development_data() -> pathlib.Path:
    """The development data, which lies beside the repository on some machines only."""
    folder = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the development data is not at {folder}")
    return folder
