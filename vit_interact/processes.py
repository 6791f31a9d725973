"""Worker processes that do not outlive who started them, and folders with one owner."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


_interrupted = threading.Event()


def remember_interrupts() -> None:
    """Has `stop_if_interrupted` know of every Ctrl-C from now on, which interrupts as before.

    Python drops the exception where Ctrl-C meets a callback: the command would go on as if nothing
    had been said. While JAX is imported, and in the garbage collector's callbacks, such as JAX has,
    it waits.
    """

    def interrupt(number: int, frame: Any) -> None:
        _interrupted.set()
        if _jax_comes_in() or _collecting(frame):
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        signal.default_int_handler(number, frame)

    # Where a shell started this with Ctrl-C ignored, as in the background, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def _jax_comes_in() -> bool:
    """Whether JAX is being imported: its native modules crash when that is interrupted."""
    spec = getattr(sys.modules.get("jax"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _collecting(frame: Any) -> bool:
    """Whether a callback of the garbage collector is at work: Python prints its exceptions."""
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in callbacks:
            return True
        frame = frame.f_back
    return False


def stop_if_interrupted() -> None:
    """For loops to ask.

    Raises:
      KeyboardInterrupt: if there was a Ctrl-C since `remember_interrupts`.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def leave_interrupted() -> NoReturn:
    """Ends this process at once: Python's own end crashes when JAX was interrupted coming in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def end_with_parent() -> None:
    """Ends this worker when its parent is killed; it would wait for work for ever.

    Does nothing in a process that no other Python process has started.
    """
    # Only here, as below: `vit-interact --help` needs no processes.
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent_at_once() -> None:
    """Has Linux end this process with the one that started it, whatever it is doing.

    For `multiprocessing`'s fork server, which only looks after its imports.
    """
    if sys.platform != "linux":
        return
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def collect_seldom(objects: int = 100_000) -> None:
    """Has Python look for garbage less often, for processes that are there for one command.

    While JAX, its programs and Matplotlib come in, by far the most objects are there to stay: by
    default all of them are looked through six times, 0.6 s of 5. What is there now is taken to
    stay: it is not looked through again.

    Args:
      objects: new ones, after which to look.
    """
    gc.freeze()
    gc.set_threshold(objects, 10, 10)


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started within are deaf to Ctrl-C; for this one it waits till the end.

    A terminal tells all processes of a command. Workers would print where they were at; it is for
    their parent to say that it was interrupted, and to end them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield  # on Windows
        return
    from multiprocessing import resource_tracker

    # What a new process inherits. multiprocessing's tracker, which starts with the first of them,
    # would undo it.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Threads of XLA do not block it, so it may still come: never ignored, and never halfway through
    # the start of a pool, whose first workers nobody would end. Other threads are not interrupted.
    held: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


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
