"""What befalls a worker process from outside: stopped, or left little of its time.

However a test ends, no process is left stopped behind it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Final

import psutil

#: How often a throttled process is looked at: its CPU time is counted in such ticks.
TICK_S: Final = 0.01

Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def stopped(process: Process) -> Iterator[None]:
    """Stop a process (SIGSTOP) as long as the block runs."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def throttled(process: Process, cpus: float) -> Iterator[None]:
    """Let a process have `cpus` CPU seconds a second as long as the block runs.

    It is stopped whenever it has had more. By the clock alone it could not be done: a
    process that was stopped goes first when others compete for the CPU.
    """
    is_over = threading.Event()

    def throttle() -> None:
        began, had_s = time.monotonic(), cpu_s(process.pid)
        while not is_over.wait(TICK_S):
            may_s = had_s + cpus * (time.monotonic() - began)
            is_due = cpu_s(process.pid) <= may_s
            process.send_signal(signal.SIGCONT if is_due else signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=throttle, name="throttle")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
