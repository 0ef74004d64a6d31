"""A coordinator whose clock runs twenty times too fast, so that leases end soon."""

from __future__ import annotations

import sys
import time

from coordinator import app, cli
from coordinator.store.system import LeaseClock

HASTE = 20.0


class HastyClock(LeaseClock):
    """The lease clock, in a hurry."""

    def now(self) -> float:
        return self._start + HASTE * (time.monotonic() - self._started)


if __name__ == "__main__":
    app.LeaseClock = HastyClock
    sys.exit(cli.main())
