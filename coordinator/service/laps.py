"""How long each stage of a piece of work took, for the log."""

from __future__ import annotations

from coordinator.domain.seams import Clock


class Laps:
    """Seconds by stage; the first begins when this is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = clock.monotonic()
        #: By the name of the stage, to the millisecond.
        self.seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """Note how long a stage took that ends now; the next one begins."""
        now = self._clock.monotonic()
        self.seconds[stage] = round(now - self._since, 3)
        self._since = now
