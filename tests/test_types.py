"""Annotations can be read by whoever wants them, as tools for documentation and checks do."""

import contextlib
import importlib
import inspect
import pkgutil
import typing

import vit_interact


def test_shapes_are_those_of_jaxtyping():
    """Which takes `Float[Array, "..."]`, not `Float[Array, ...]`, that a linter makes of it."""
    read = 0
    for found in pkgutil.walk_packages(vit_interact.__path__, "vit_interact."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == found.name:
                # Types of what a module imports late are not known to it.
                with contextlib.suppress(NameError):
                    typing.get_type_hints(inspect.unwrap(function))
                    read += 1
    assert read > 500
