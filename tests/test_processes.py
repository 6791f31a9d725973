"""Worker processes and Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from vit_interact.processes import deaf_to_interrupts, remember_interrupts

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of a terminal")
DEAF = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"


def starts_deaf():
    return subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True).stdout


@pytest.fixture
def interruptible():
    """Python leaves Ctrl-C ignored where a shell started it so, as it does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("by_a_thread", [False, True])
def test_an_interrupt_waits_for_the_end(by_a_thread):
    """It is not lost, whether the main thread gets it or one that does not block it."""
    reached = False
    with pytest.raises(KeyboardInterrupt), deaf_to_interrupts():
        if by_a_thread:
            command = f"import os, signal; os.kill({os.getpid()}, signal.SIGINT)"
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            subprocess.run([sys.executable, "-c", command], check=True)
        else:
            signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert starts_deaf().strip() == "False"


def test_processes_started_within_are_deaf():
    with deaf_to_interrupts():
        assert starts_deaf().strip() == "True"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ()))
    assert signal.SIGINT in found


DROPPED = """
import signal
from vit_interact.processes import remember_interrupts, stop_if_interrupted

class Callback:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
remember_interrupts()
stop_if_interrupted()
Callback()
print("went on")
stop_if_interrupted()
print("went on again")
"""


def test_an_interrupt_that_python_drops_is_not_forgotten():
    ran = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True)
    assert ran.stdout == "went on\n"
    assert "Exception ignored" in ran.stderr and ran.returncode


COMES_IN = """
import signal, time
from vit_interact.processes import remember_interrupts

signal.signal(signal.SIGINT, signal.default_int_handler)
remember_interrupts()
try:
    import jax
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_waits_until_jax_is_there(tmp_path):
    """Its native modules crash when their import is interrupted; here a module of its name."""
    (tmp_path / "jax.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.3)\nprint('jax')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    ran = subprocess.run([sys.executable, "-c", COMES_IN], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": path}, timeout=60)  # fmt: skip
    assert ran.stdout == "jax\ninterrupted\n", ran.stderr


COLLECTS = """
import gc, signal, time
from vit_interact.processes import remember_interrupts

def callback(phase, info):
    if phase == "start":
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
remember_interrupts()
gc.callbacks.append(callback)
try:
    gc.collect()
    gc.callbacks.clear()
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_waits_for_the_garbage_collectors_callbacks():
    """Python prints a traceback of what comes out of them, and goes on."""
    ran = subprocess.run([sys.executable, "-c", COLLECTS], capture_output=True, text=True,
                         timeout=60)  # fmt: skip
    assert ran.stdout == "interrupted\n" and not ran.stderr


def test_interrupts_that_a_shell_has_ignored_stay_so(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    remember_interrupts()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
