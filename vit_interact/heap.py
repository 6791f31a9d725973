"""Memory that a CPU program frees stays with the process, to be written again without page faults.

XLA's CPU client asks for a program's temporary memory at each call and frees it afterwards. glibc
returns blocks of that size to the kernel, which must fill each page with zeros at the next call: a
quarter of a small ViT's training step (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h: M_TRIM_THRESHOLD (-1: never trim), M_MMAP_MAX (0: the main thread's blocks of
# any size come from its heap).
_SETTINGS = ((-1, -1), (-4, 0))


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what is freed; call it before JAX has been used.

    For programs, not for libraries: it holds for the whole process, whose size then stays at its
    largest. Programs on a CPU run in the thread that calls them from then on, as only the main
    thread's heap can grow to any size. One heap for all threads would do as well, but those that
    compile would wait for each other (docs/performance.md).

    Returns:
      Whether it was done; other allocators and systems are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    if not all([mallopt(number, value) == 1 for number, value in _SETTINGS]):
        return False
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
