"""How fast something trains: tokens between two moments, after a warm-up.

Work is counted where it ended, never from where it was claimed: what passes between two
tasks counts too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordinator.store.rows import PointRow

#: Rounds that are not counted: workers fetch text, and their speed is still a guess.
WARM_UP_ROUNDS: Final = 2
#: Steps of a loop that are not counted: allocators grow their caches.
WARM_UP_STEPS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What was trained between two moments."""

    #: Rounds of a fleet, or steps of loops; a part of a step counts as a part.
    count: float
    tokens: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def __add__(self, other: Pace) -> Pace:
        """Return the pace of two turns, one after the other."""
        return Pace(
            count=self.count + other.count,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
        )


def pace_of_rounds(versions: Sequence[PointRow], *, until: float) -> Pace:
    """Return the pace of a run, from all its versions, up to a moment (Unix seconds).

    It begins and ends with a version that was published. Raises ValueError where no
    round lies between.
    """
    counted = [
        point for point in versions[WARM_UP_ROUNDS:] if point.created_at <= until
    ]
    if len(counted) < 2:
        raise ValueError(
            f"at least {WARM_UP_ROUNDS + 1} rounds must end in time, got "
            f"{sum(point.created_at <= until for point in versions[1:])}"
        )
    first, last = counted[0], counted[-1]
    return Pace(
        count=len(counted) - 1,
        tokens=last.tokens_total - first.tokens_total,
        seconds=last.created_at - first.created_at,
    )


def pace_of_steps(moments: Sequence[Sequence[float]], *, tokens: int) -> Pace:
    """Return the pace of loops while all of them trained, steps of `tokens` each.

    `moments` has for each loop the seconds, by one clock, at which its steps ended.
    Raises ValueError where a loop made too few steps, or they never ran together.
    """
    least = WARM_UP_STEPS + 1
    if min(map(len, moments)) < least:
        raise ValueError(
            f"each loop must make at least {least} steps, got "
            f"{', '.join(str(len(its)) for its in moments)}"
        )
    start = max(its[WARM_UP_STEPS - 1] for its in moments)
    end = min(its[-1] for its in moments)
    if end <= start:
        raise ValueError("the loops must train at the same time, one ended too early")
    steps = float(sum(_steps_between(its, start, end) for its in moments))
    return Pace(count=steps, tokens=steps * tokens, seconds=end - start)


def _steps_between(moments: Sequence[float], start: float, end: float) -> float:
    """Return how many steps of one loop lie between: of those at the ends, a part."""
    before, after = np.interp((start, end), moments, np.arange(len(moments)))
    return float(after - before)


def gain(paces: Mapping[int, Pace]) -> float:
    """Return how many times the pace of one is the pace of two."""
    return paces[2].tokens_per_s / paces[1].tokens_per_s
