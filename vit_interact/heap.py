"""Memory that a CPU program frees stays with the process, to be written again without page faults.

XLA's CPU client asks for a program's temporary memory at each call and frees it afterwards. glibc
returns blocks of that size to the kernel, which must fill each page with zeros at the next call: a
quarter of a small ViT's training step (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h: M_TRIM_THRESHOLD (-1: never trim), M_MMAP_MAX (0: blocks of any size come
# from the heap), M_ARENA_MAX (only the first arena can grow to any size).
_SETTINGS = ((-1, -1), (-4, 0), (-8, 1))


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what is freed; call it before threads are started.

    For programs, not for libraries: it holds for the whole process, whose size then stays at its
    largest. The same without this function, for a program of your own: the environment's
    `MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`.

    Returns:
      Whether it was done; other allocators and systems are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    return all([mallopt(number, value) == 1 for number, value in _SETTINGS])
