"""What a virtual worker does with a task, second by second; nothing is trained.

A task is fetched, trained in local steps that jitter, and sent. All of it is laid out
at the claim as a function of work time: seconds in which the process really runs.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordinator.domain.leases import Reported
from worker.heartbeat import is_out_of_time

STEP_TOKENS: Final = 1024
SEQ_LEN: Final = 128
JITTER: Final = 0.10
DOWN_BYTES: Final = 4_000_000
UP_BYTES: Final = 500_000
THREADS: Final = 2.0
#: CPU time of the heartbeat itself: a hung process is never quite at 0 %.
BEAT_CPU_S: Final = 0.002
#: A neighbour takes this much of a box for the rest of a task, now and then.
SLOWED_BY: Final = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The network between a worker and the coordinator."""

    down_s: float
    up_s: float
    #: Mean and largest seconds that a heartbeat is on its way.
    delay_s: float
    most_delay_s: float


FAST: Final = Link(down_s=2.0, up_s=0.5, delay_s=0.1, most_delay_s=2.0)
SLOW: Final = Link(down_s=45.0, up_s=15.0, delay_s=2.0, most_delay_s=12.0)


class Work:
    """One task on one worker, laid out in work time."""

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        num_tokens: int,
        tokens_per_s: float,
        link: Link,
        slowed: bool,
        stop_after_s: float,
    ) -> None:
        num_full, rest = divmod(num_tokens, STEP_TOKENS)
        sizes = np.array([STEP_TOKENS] * num_full + [rest] * (rest > 0), dtype=float)
        # The day's form of the box, and of each step.
        pace = max(0.5, rng.normal(1.0, JITTER)) / tokens_per_s
        seconds = sizes * pace * np.maximum(0.5, rng.normal(1.0, JITTER, sizes.size))
        if slowed:
            seconds[int(rng.integers(sizes.size)) :] *= SLOWED_BY
        self._link = link
        self._step_s = seconds.tolist()
        self._ends = (link.down_s + np.cumsum(seconds)).tolist()
        self._done = [0, *np.cumsum(sizes).astype(int).tolist()]
        self._end_early(stop_after_s)
        self.total_s = float(self._ends[-1]) + link.up_s

    @property
    def compute_s(self) -> float:
        """Return how long all steps take, as a worker measures it."""
        return float(sum(self._step_s))

    def _end_early(self, stop_after_s: float) -> None:
        """Leave out the steps that the worker will not make, by the worker's rule."""
        first = bisect_right(self._ends, stop_after_s)
        for step in range(first, len(self._ends) - 1):
            end, done = self._ends[step], self._done[step + 1]
            left_s = (end - self._link.down_s) * (self._done[-1] / done - 1.0)
            if is_out_of_time(end, left_s, stop_after_s):
                del self._ends[step + 1 :], self._step_s[step + 1 :]
                del self._done[step + 2 :]
                return

    @property
    def num_tokens(self) -> int:
        """Tokens that are handed in."""
        return int(self._done[-1])

    def tokens(self, work_s: float) -> int:
        """Return the tokens of all steps that have ended."""
        return int(self._done[bisect_right(self._ends, work_s)])

    def said(self, work_s: float, extra_cpu_s: float) -> Reported:
        """Return what a heartbeat reports; `extra_cpu_s` is CPU time beside steps."""
        link = self._link
        num_steps = bisect_right(self._ends, work_s)
        moved = DOWN_BYTES * min(1.0, work_s / link.down_s)
        moved += UP_BYTES * min(1.0, max(0.0, work_s - self._ends[-1]) / link.up_s)
        busy_s = min(max(0.0, work_s - link.down_s), self._ends[-1] - link.down_s)
        return Reported(
            tokens_done=int(self._done[num_steps]),
            bytes_done=int(moved),
            cpu_s=THREADS * busy_s + extra_cpu_s,
            step_s=self._step_s[num_steps - 1] if num_steps else 0.0,
        )
