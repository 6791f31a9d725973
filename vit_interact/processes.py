"""Worker processes that do not outlive who started them, and folders with one owner."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path


def end_with_parent() -> None:
    """Ends this worker when its parent is killed; it would wait for work for ever.

    Does nothing in a process that no other Python process has started.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C.

    A terminal tells all processes of a command. Workers would print where they were at; it is for
    their parent to say that it was interrupted, and to end them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change what a signal does
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; a killed one leaves it free.

    Args:
      folder: that exists.

    Raises:
      ValueError: when another process has it.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        yield
        return
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ValueError(
                f"{folder}: process {lock.read() or '?'} is at work in it; wait for that one to "
                "end, or give another folder"
            ) from error
        except OSError:
            # Some network file systems have no locks either.
            yield
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
