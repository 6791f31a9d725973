"""Programs on disk: found without tracing, told apart, and made again when they are no use."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from vit_interact import programs
from vit_interact.observe.analyze import windows_of

# A process of its own: only where there is one device are programs kept.
SCRIPT = """
import pathlib, sys, warnings
import jax, numpy as np
from vit_interact import compile_cache, programs
from vit_interact.interactions import windows
from vit_interact.layout import TokenLayout
from vit_interact.observe.analyze import windows_of

what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir(exist_ok=True)
if "beside" in what:  # JAX's own folder has the same program
    compile_cache.keep_compiled(str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
programs.keep_programs(folder)
traced, search = [], windows.smallest_windows
windows.smallest_windows = lambda *a: traced.append(1) or search(*a)
if "broken" in what:
    def fail(tree):
        jax.block_until_ready = real
        raise jax.errors.JaxRuntimeError("NOT_FOUND: a function")
    real, jax.block_until_ready = jax.block_until_ready, fail
rows = np.random.default_rng(0).random((2, 12, 12), np.float32)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    first = windows_of(rows, TokenLayout(3, 4), 0.8)
    ready = windows_of.lower(rows, TokenLayout(3, 4), 0.8)
    again = ready.compile()(rows)
    within = jax.jit(lambda x: windows_of(x, TokenLayout(3, 4), coverage=0.8))(rows)
for other in (again, within):
    jax.tree.map(np.testing.assert_array_equal, first, other)
np.testing.assert_array_equal(first[0], search(rows, TokenLayout(3, 4), 0.8))
said = sum("cannot be used" in str(warning.message) for warning in told)
print(len(traced) - 1, said, first[0].sum())
"""


REMEMBER = """
import pathlib, sys
from vit_interact import programs
from vit_interact.models import architecture
from vit_interact.models.config import ViTConfig

programs.keep_programs(pathlib.Path(sys.argv[2]))
traced, trace = [], architecture.jax.eval_shape
architecture.jax.eval_shape = lambda *a: traced.append(1) or trace(*a)
config = ViTConfig(image_size=(32, 48), depth=int(sys.argv[1]), width=48, num_classes=3)
shapes = architecture.expected_shapes(config)
assert shapes == {path: tuple(shape) for path, shape in architecture._traced_shapes(config).items()}
# One for the key, one for the model.
print(len(traced) - 2, len(shapes))
"""


def run(what, folder, script=SCRIPT):
    """Numbers that a process prints."""
    command = [sys.executable, "-c", script, what, str(folder)]
    return tuple(map(int, subprocess.check_output(command, text=True, timeout=120).split()))


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kept for the CPU alone")


@on_cpu
def test_a_program_is_traced_once_for_all_processes(tmp_path):
    traced, said, found = run("plain", tmp_path)
    (kept,) = tmp_path.iterdir()
    assert (traced, said) == (1, 0) and kept.name.startswith("_windows_of_")
    assert run("plain", tmp_path) == (0, 0, found)


@on_cpu
def test_shapes_are_traced_once_for_all_processes(tmp_path):
    traced, count = run("2", tmp_path, REMEMBER)
    (kept,) = tmp_path.iterdir()
    assert traced == 2
    assert run("2", tmp_path, REMEMBER) == (0, count)
    kept.write_text("{")
    assert run("2", tmp_path, REMEMBER) == (2, count)
    assert run("3", tmp_path, REMEMBER)[0] == 2 and len(list(tmp_path.iterdir())) == 2


@on_cpu
@pytest.mark.slow
def test_a_program_that_is_damaged_or_does_not_run_is_made_again(tmp_path):
    found = run("plain", tmp_path)[2]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert run("plain", tmp_path) == (1, 1, found)
    assert run("broken", tmp_path) == (1, 1, found)
    assert not list(tmp_path.iterdir())  # the next process keeps another
    assert run("plain", tmp_path) == (1, 0, found)
    assert run("plain", tmp_path) == (0, 0, found)


@on_cpu
@pytest.mark.slow
def test_what_jax_had_is_not_copied(tmp_path):
    """A copy of it would lack its machine code."""
    found = run("beside", tmp_path)[2]
    (kept,) = tmp_path.glob("*.program")
    assert run("beside", tmp_path) == (0, 0, found)
    kept.unlink()
    assert run("beside", tmp_path) == (1, 0, found)  # from JAX's folder
    assert run("beside", tmp_path) == (1, 0, found) and not list(tmp_path.glob("*.program"))


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A folder of programs, as if this process had one device."""
    monkeypatch.setattr(programs, "_folder", tmp_path)
    return tmp_path


def test_arguments_are_told_apart(kept):
    layout, rows = vi.TokenLayout(3, 4), np.ones((2, 12, 12), np.float32)

    def path(*arguments, **named):
        return windows_of._path((), arguments, named)

    one = path(rows, layout, 0.5)
    assert one.parent == kept
    assert one == path(jnp.zeros((2, 12, 12)), vi.TokenLayout(3, 4), 0.5)
    others = [
        path(rows[:1], layout, 0.5),
        path(rows.astype(np.float16), layout, 0.5),
        path(rows, layout, 0.25),
        path(rows, vi.TokenLayout(4, 3), 0.5),
        path(rows, layout, coverage=0.5),
        windows_of._path((("xla_option", "1"),), (rows, layout, 0.5), {}),
    ]
    assert len({one, *others}) == 7


def test_source_and_settings_count(kept, monkeypatch):
    arguments = (np.ones((2, 12, 12), np.float32), vi.TokenLayout(3, 4), 0.5)
    before = windows_of._path((), arguments, {})
    monkeypatch.setattr(programs, "_surroundings", lambda: "another version")
    assert windows_of._path((), arguments, {}) != before
    monkeypatch.undo()
    assert windows_of._path((), arguments, {}) is None


@dataclasses.dataclass(frozen=True)
class Theirs:
    number: int


@pytest.mark.parametrize(
    "value",
    [lambda x: x, functools.partial(max, 1), object(), Theirs(3), np.ones(3), len],
    ids=["lambda", "partial", "object", "dataclass of others", "array", "built in"],
)
def test_what_cannot_be_told_apart_is_not_kept(kept, value):
    with pytest.raises(programs._Unknown):
        programs._describe(value)
    rows = np.ones((2, 12, 12), np.float32)
    assert windows_of._path((), (rows, value, 0.5), {}) is None


def test_models_are_told_apart_by_what_they_are_made_of():
    def described(**settings):
        return programs._describe(vi.create_model("vit_ti16", image_size=32, **settings))

    assert described(depth=2) == described(depth=2)
    assert described(depth=2) != described(depth=3)
    assert described(dtype="bfloat16") != described()
    # Flax's modules hold their parents and what they were bound to: those are not described.
    assert "parent" not in str(described())
