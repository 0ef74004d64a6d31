"""Patience: send a request again until it is answered, and never in step with others.

Full jitter: the n-th wait is uniform between 0 and min(cap, base * 2**n)
seconds, so that a fleet that lost its coordinator does not come back at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from worker.errors import RetryLaterError

log = logging.getLogger(__name__)

T = TypeVar("T")

BASE_S: Final = 0.5
CAP_S: Final = 30.0
# A wait is cut in slices, so that a signal or a lost lease ends it within one.
_SLICE_S: Final = 0.2


class Retry:
    """Repeats what may be repeated; chance and sleep are given."""

    def __init__(
        self,
        rng: random.Random,
        sleep: Callable[[float], None] = time.sleep,
        *,
        base_s: float = BASE_S,
        cap_s: float = CAP_S,
    ) -> None:
        self._rng = rng
        self._sleep = sleep
        self._base_s = base_s
        self._cap_s = cap_s

    def until_answered(self, request: Callable[[], T], check: Callable[[], None]) -> T:
        """Return what `request` returns, trying again after each RetryLaterError.

        `check` is called before each try and while waiting; it ends the
        attempts by raising (lease lost, told to stop).
        """
        attempt = 0
        while True:
            check()
            try:
                return request()
            except RetryLaterError as error:
                attempt = 0 if error.progressed else attempt
                delay_s = error.retry_after_s + self.delay_s(attempt)
                attempt += 1
                log.warning(
                    "%s; trying again in %.1f s",
                    error,
                    delay_s,
                    extra={"event": "request.retried", "seconds": round(delay_s, 3)},
                )
            self.pause(delay_s, check)

    def delay_s(self, attempt: int) -> float:
        """Return the wait after the try with this number, counted from 0."""
        # 16 doublings are beyond any cap; more would overflow after days.
        return self._rng.uniform(
            0.0, min(self._cap_s, self._base_s * 2.0 ** min(attempt, 16))
        )

    def pause(self, seconds: float, check: Callable[[], None]) -> None:
        """Wait; `check` may end it early by raising."""
        left_s = seconds
        while left_s > 0.0:
            check()
            self._sleep(min(left_s, _SLICE_S))
            left_s -= _SLICE_S
