"""Compiled programs on disk: where, when not, and what damage or company does."""

import pathlib
import subprocess
import sys

import pytest

from vit_interact import compile_cache

# Counts what JAX finds on disk; the second and third compilation of a program are asked for by
# forgetting the first.
SCRIPT = """
import pathlib, sys, warnings
import jax, jax.numpy as jnp
from vit_interact.compile_cache import keep_compiled

folder = keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)
x = jnp.arange(6.0)
def run():
    return float(jax.jit(lambda x: jnp.sin(x).sum())(x))
first = run()
kept = list(folder.glob("*-cache"))
assert kept
hits.clear()
jax.clear_caches()
assert run() == first and hits
if "damage" in sys.argv:
    for entry in kept:
        entry.write_bytes(entry.read_bytes()[:100])
jax.clear_caches()
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    assert run() == first
print("same")
"""


def test_processes_share_a_folder_and_survive_damage(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "kept")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["same"] * 2
    assert subprocess.check_output([*command, "damage"], text=True).strip() == "same"


def test_where_programs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.cache_folder() == tmp_path / "vit_interact"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    assert compile_cache.cache_folder() == tmp_path / ".cache" / "vit_interact"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compile_cache.cache_folder() == tmp_path / "Library" / "Caches" / "vit_interact"


@pytest.mark.parametrize("how", ["argument", "environment", "unwritable"])
def test_programs_are_not_kept(monkeypatch, tmp_path, how):
    import jax

    before = jax.config.jax_compilation_cache_dir
    if how == "unwritable":
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "file"))
    if how == "environment":
        monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert compile_cache.keep_compiled("off" if how == "argument" else "") is None
    assert jax.config.jax_compilation_cache_dir == before


def test_old_entries_are_forgotten(tmp_path):
    import os

    old, new = tmp_path / "a-cache", tmp_path / "b-cache"
    for entry in (old, new):
        entry.write_bytes(b"x")
    os.utime(old, (0, 0))
    compile_cache._forget_old(tmp_path)
    assert list(tmp_path.iterdir()) == [new]
