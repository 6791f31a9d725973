"""Programs that know what XLA is to be told, and that commands find again without tracing them.

JAX's own folder of compiled programs saves XLA's work. A command that has one image to measure then
spends most of its time on the way there: to trace the model and to lower it, only to learn that
its program is known. Here a program is known by what it would be traced from, so that nothing is
traced (`docs/performance.md`, "Start").
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import logging
import os
import pickle
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vit_interact.compile_cache import machine

SUFFIX, REMEMBERED = ".program", ".json"
_log = logging.getLogger(__name__)
_folder: Path | None = None


@runtime_checkable
class Lowered(Protocol):
    """What `jax.stages.Lowered` has of use here."""

    def compile(self) -> Any:
        """A function of the arguments that are not static."""


def keep_programs(folder: Path | None) -> None:
    """Keeps programs that can be told apart in a folder from now on; None for no longer.

    Only for commands, whose process runs this package as it is on disk: a function that somebody
    has replaced would not be noticed. Files there are read with `pickle`, as trustworthy as the
    machine code beside them.

    Args:
      folder: of `compile_cache.keep_compiled`.
    """
    global _folder
    # Of other devices programs are bound to these, which was not tried.
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    if alone and folder is not None and _folder is None:
        jax.monitoring.register_event_listener(_listen)
    _folder = folder if alone else None


class Program:
    """`jax.jit` with the compiler's options that suit the arguments.

    Within another program, whose options hold, or a derivative, it is `jax.jit`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        told: Callable[..., Mapping[str, str]] = lambda *_, **__: {},
        **options: Any,
    ) -> None:
        """Compiles nothing yet.

        Args:
          function: to compile.
          told: `compiler_options` of `jax.jit`, from the arguments.
          options: of `jax.jit`; static arguments by name.
        """
        self._function, self._told, self._options = function, told, options
        names = options.get("static_argnames", ())
        self._static = frozenset([names] if isinstance(names, str) else names)
        self._signature = inspect.signature(function)
        self._jitted = functools.cache(self._jit)
        self._ready: dict[Path, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Runs it."""
        if _traced(arguments, named):
            return self._jitted(())(*arguments, **named)
        told = self._told_of(arguments, named)
        path = self._path(told, arguments, named)
        if path is None:
            return self._jitted(told)(*arguments, **named)
        compiled = self._lower(path, told, arguments, named).compile()
        names = list(self._signature.parameters)
        return compiled(
            *(x for name, x in zip(names, arguments, strict=False) if name not in self._static),
            **{name: x for name, x in named.items() if name not in self._static},
        )

    def lower(self, *arguments: Any, **named: Any) -> Lowered:
        """What the compiler would be given, or a program that is ready."""
        told = self._told_of(arguments, named)
        path = self._path(told, arguments, named)
        if path is None:
            return self._jitted(told).lower(*arguments, **named)
        return self._lower(path, told, arguments, named)

    def _lower(
        self,
        path: Path,
        told: tuple[tuple[str, str], ...],
        arguments: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Lowered:
        """A program that is kept."""

        def lower() -> jax.stages.Lowered:
            return self._jitted(told, path.stem).lower(*arguments, **named)

        if path not in self._ready:
            found = _read(path)
            if found is None:
                return _ToKeep(lower(), path, self._ready)
            self._ready[path] = _FromDisk(found, path, lower)
        return _Ready(self._ready[path])

    def _told_of(
        self, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[str, str], ...]:
        return tuple(self._told(*arguments, **named).items())

    def _jit(self, told: tuple[tuple[str, str], ...], name: str = "") -> Any:
        function = self._function
        if name:
            # A name of its own has JAX compile it: a copy of what JAX had in its own folder lacks
            # the machine code (jaxlib 0.10.2).
            function = functools.wraps(function)(
                lambda *args, **kwargs: self._function(*args, **kwargs)
            )
            function.__name__ = name
        options = {**self._options, **({"compiler_options": dict(told)} if told else {})}
        return jax.jit(function, **options)

    def _path(self, told: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Path | None:
        """Where the program of these arguments is kept; None when it is not."""
        if _folder is None or not _ours(self._function):
            return None
        bound = self._signature.bind(*arguments, **named).arguments
        try:
            apart = [_name(self._function), told, _surroundings(), len(arguments), list(named)]
            for name, value in bound.items():
                static = name in self._static
                apart.append((name, _describe(value) if static else _describe_arrays(value)))
        except _Unknown:
            return None
        return _folder / f"{self._function.__name__}_{_digest(apart)}{SUFFIX}"


def remembered(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a pure function of this package gives, as JSON keeps it: lists in place of tuples.

    Traced shapes, for one, are known on disk as programs are, where these are kept.

    Args:
      function: of this package; gives what JSON can hold.
      *arguments: numbers, text, and this package's dataclasses of such.
    """
    path = _remembered_at(function, arguments)
    if path is None:
        return json.loads(json.dumps(function(*arguments)))
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        text = json.dumps(function(*arguments))
    atexit.register(_write, path, text.encode)
    return json.loads(text)


def _remembered_at(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Path | None:
    if _folder is None or not _ours(function):
        return None
    try:
        described = list(map(_describe, arguments))
    except _Unknown:
        return None
    digest = _digest([_name(function), _surroundings(), described])
    return _folder / f"{function.__name__}_{digest}{REMEMBERED}"


@dataclasses.dataclass(frozen=True)
class _Ready:
    compiled: Any

    def compile(self) -> Any:
        return self.compiled


@dataclasses.dataclass(frozen=True)
class _ToKeep:
    lowered: Any
    path: Path
    ready: dict[Path, Any]

    def compile(self) -> Any:
        _jax.had_it = False
        compiled = self.ready[self.path] = self.lowered.compile()
        if not _jax.had_it:
            _keep(self.path, compiled)
        return compiled


class _FromDisk:
    """A program that was read; if it does not run, it is made again."""

    def __init__(self, compiled: Any, path: Path, lower: Callable[[], jax.stages.Lowered]) -> None:
        self._compiled, self._path, self._lower = compiled, path, lower
        self._has_run = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        found = self._compiled(*arguments, **named)
        if self._has_run:
            return found
        self._has_run = True
        try:
            return jax.block_until_ready(found)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            _say_unusable(self._path, error)
        self._compiled = self._lower().compile()
        return self._compiled(*arguments, **named)


# Whether JAX had what this thread has compiled in its own folder.
_jax = threading.local()


def _listen(event: str, **_: Any) -> None:
    if event.endswith("/cache_hits"):
        _jax.had_it = True


def _keep(path: Path, compiled: Any) -> None:
    from jax.experimental import serialize_executable

    try:
        # Before it runs: XLA cannot write sorts that have run. A first result should not wait for
        # the rest, which is done at the end of the command.
        parts = serialize_executable.serialize(compiled)
    except Exception as error:  # jax promises nothing
        _log.info("%s was not kept: %s", path, error)
        return
    atexit.register(_write, path, lambda: zlib.compress(pickle.dumps(parts), 1))


def _write(path: Path, content: Callable[[], bytes]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content())
        os.replace(unfinished, path)
    except Exception as error:  # a full disk, or trees that cannot be pickled
        _log.info("%s was not kept: %s", path, error)


def _read(path: Path) -> Any:
    """A program from disk; None where there is none."""
    from jax.experimental import serialize_executable

    try:
        compressed = path.read_bytes()
    except OSError:
        return None
    try:
        # zlib notices damage, at which the linker might crash.
        parts = pickle.loads(zlib.decompress(compressed))
        compiled = serialize_executable.deserialize_and_load(*parts)
        jax.tree.leaves(compiled.out_info)
    except Exception as error:
        _say_unusable(path, error)
        return None
    return compiled


def _say_unusable(path: Path, error: Exception) -> None:
    warnings.warn(f"{path} cannot be used and is made again: {error}", stacklevel=2)
    with contextlib.suppress(OSError):
        path.unlink()


class _Unknown(Exception):
    """Something that is not told apart by what it is made of."""


def _describe(value: Any) -> Any:
    """What tells a static argument apart, in any process.

    Raises:
      _Unknown: if that is not certain.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return (type(value).__name__, repr(value))
    if isinstance(value, enum.Enum):
        return (_name(type(value)), value.name)
    if isinstance(value, np.dtype):
        return ("dtype", str(value))
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, tuple | list):
        return (_name(type(value)), [_describe(item) for item in value])
    if isinstance(value, dict):
        return ("dict", [(_describe(key), _describe(item)) for key, item in value.items()])
    if isinstance(value, jax.sharding.Mesh) and value.size == 1:
        return ("mesh", value.axis_names, str(value.axis_types))
    if dataclasses.is_dataclass(value) and _ours(type(value)):
        return (_name(type(value)), [
            (field.name, _describe(getattr(value, field.name)))
            for field in dataclasses.fields(value)
            if field.name != "parent"  # of Flax's modules, which stand alone here
        ])  # fmt: skip
    raise _Unknown(value)


def _digest(apart: Any) -> str:
    return hashlib.sha256(repr(apart).encode()).hexdigest()[:40]


def _ours(value: Any) -> bool:
    """Whether its source is counted, and it can be named."""
    return value.__module__.startswith(f"{__package__}.") and "<" not in value.__qualname__


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _describe_arrays(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), [_describe_array(leaf) for leaf in leaves]


def _describe_array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return (leaf.shape, str(leaf.dtype), bool(getattr(leaf, "weak_type", False)))
    return _describe(leaf)


@functools.cache
def _surroundings() -> Any:
    """What programs depend on beside their arguments."""
    import flax

    source = hashlib.sha256()
    home = Path(__file__).parent
    for path in sorted(home.rglob("*.py")):
        source.update(str(path.relative_to(home)).encode())
        source.update(hashlib.sha256(path.read_bytes()).digest())
    config = {k: v for k, v in jax.config.values.items() if "cache" not in k and "log" not in k}
    return (
        source.hexdigest(), machine(), os.cpu_count(), jax.__version__, flax.__version__,
        os.environ.get("XLA_FLAGS", ""), sorted(map(repr, config.items())),
    )  # fmt: skip


def _traced(*arguments: Any) -> bool:
    """Whether something is being traced: the arguments, or a program that this is a part of."""
    leaves = [*jax.tree.leaves(arguments), jnp.zeros(())]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
