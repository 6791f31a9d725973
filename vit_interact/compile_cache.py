"""Compiled programs are kept on disk, so that the second start of a command need not compile.

They lie in the user's cache folder, in a folder for each jaxlib and kind of processor: XLA compiles
for the processor it runs on, and a home directory may be shared by unlike machines. A damaged entry
costs a warning and a compilation, never a wrong result. Beside JAX's entries lie those of
`programs`, which are found without tracing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
import time
from pathlib import Path

VARIABLE = "VIT_INTERACT_COMPILE_CACHE"
OFF = "off"
_DAYS = 30


def cache_folder() -> Path:
    """Where this platform wants `vit_interact` to keep what can be made again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vit_interact"


def keep_compiled(folder: str | os.PathLike[str] = "") -> Path | None:
    """Makes JAX keep compiled programs; call it before anything is compiled.

    Args:
      folder: where; `off` for nowhere; empty for what the environment's
        `VIT_INTERACT_COMPILE_CACHE` says (a folder, or `off`), and else the user's cache folder.
        A cache that JAX has been told of itself (`JAX_COMPILATION_CACHE_DIR`) stays when `folder`
        is empty.

    Returns:
      The folder, or None when programs are not kept, as where it cannot be made.
    """
    import jax

    chosen = os.fspath(folder)
    if not chosen:
        already = getattr(jax.config, "jax_compilation_cache_dir", None)
        if already:
            return Path(already)
        chosen = os.environ.get(VARIABLE, "")
    if chosen == OFF:
        return None
    path = (Path(chosen) if chosen else cache_folder() / "compiled") / machine()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _forget_old(path)
    except OSError:
        # A home that cannot be written to is no reason to compute nothing.
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Below a tenth of a second reading costs as much as compiling.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def machine() -> str:
    """A name for what decides whether a compiled program runs here."""
    import jaxlib

    features = platform.processor()
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
        features = " ".join(sorted(found.group(0).split())) if found else features
    digest = hashlib.sha256(f"{platform.system()} {features}".encode()).hexdigest()[:12]
    return f"jaxlib-{jaxlib.__version__}-{platform.machine()}-{digest}"


def _forget_old(path: Path) -> None:
    """Removes entries of a month ago: sizes and models change, and the folder would only grow."""
    limit = time.time() - _DAYS * 86400
    kinds = ("*-cache", "*.program", "*.json", "*.unfinished")
    for entry in (entry for kind in kinds for entry in path.glob(kind)):
        # Another process may remove it first.
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime < limit:
                entry.unlink()
