"""SIGTERM and SIGINT: finish what fits in the grace period, else stop as far as it is.

The first signal only takes note; the loop asks between two steps. Should a step
outlast the grace, a timer gives the task back and ends the process. The second
signal ends it at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

from worker.errors import StoppedError

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# The estimate of what is left is a guess; this much of the grace is its margin.
_USABLE_SHARE: Final = 0.8
# Kept for giving the task back and for the last log records.
LAST_WORDS_SHARE: Final = 0.1


class Shutdown:
    """Whether to stop, and how much time is left; written by the signal handler."""

    def __init__(
        self, grace_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._asked_at_s: float | None = None
        self._on_overrun: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        """True after the first signal."""
        return self._asked_at_s is not None

    def install(self, on_overrun: Callable[[], None]) -> None:
        """Catch the signals; `on_overrun` is called when the grace is nearly over.

        It runs in a thread of its own and must end the process.
        """
        self._on_overrun = on_overrun
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def request(self) -> None:
        """Ask the worker to stop; the grace period begins."""
        self._asked_at_s = self._clock()

    def check(self) -> None:
        """Raise StoppedError once asked to stop: for waits that hold nothing."""
        if self.requested:
            raise StoppedError("told to stop")

    def fits(self, needed_s: float | None) -> bool:
        """Return whether work of `needed_s` can end before this process has to.

        None means that nobody knows: too long, once asked to stop.
        """
        if self._asked_at_s is None:
            return True
        left_s = self._asked_at_s + _USABLE_SHARE * self._grace_s - self._clock()
        return needed_s is not None and needed_s <= left_s

    def check_fits(self, needed_s: float | None) -> None:
        """Raise StoppedError when work of `needed_s` cannot end within the grace."""
        if not self.fits(needed_s):
            raise StoppedError(
                "told to stop, and the task does not fit in the "
                f"{self._grace_s:g} s of grace"
            )

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # No logging here: the signal may have come in the middle of a log line.
        if self.requested:
            os._exit(128 + number)
        self.request()
        if self._on_overrun is not None:
            timer = threading.Timer(
                (1.0 - LAST_WORDS_SHARE) * self._grace_s, self._on_overrun
            )
            timer.daemon = True
            timer.start()
