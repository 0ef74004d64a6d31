"""How late the event loop runs: the proof that nothing blocks it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from coordinator.domain.seams import Clock

#: What blocks the loop for longer than this is always seen; each tick costs CPU time.
TICK_S: Final = 0.1
WINDOW_S: Final = 10.0


class LoopLag:
    """Measures by how much a short sleep is overslept."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._late: deque[tuple[float, float]] = deque()
        #: Worst since the start, in seconds.
        self.worst_ever_s = 0.0

    async def run(self) -> None:
        """Measure; never returns."""
        while True:
            before = self._clock.monotonic()
            await asyncio.sleep(TICK_S)
            after = self._clock.monotonic()
            self._note(after, after - before - TICK_S)

    def _note(self, at: float, late_s: float) -> None:
        self.worst_ever_s = max(self.worst_ever_s, late_s)
        self._late.append((at, late_s))
        while self._late[0][0] < at - WINDOW_S:
            self._late.popleft()

    def worst_s(self) -> float:
        """Return the worst delay of the last ten seconds."""
        return max((late for _, late in self._late), default=0.0)
