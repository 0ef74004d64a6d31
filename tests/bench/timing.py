"""Contenders timed in turn: what disturbs the machine disturbs all of them alike.

A contender makes one run and returns its seconds. In each round every contender has
a turn, and the next round begins with another one, so that none always inherits the
caches of the same neighbour. Ratios are of minima, the time that a run takes when
nothing else wants the core; medians are shown beside them, and a median far above
its minimum says that something did.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

#: Makes one run; returns its seconds.
Contender = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Times:
    """The seconds of one contender, a number for each round."""

    rounds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.rounds)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.rounds)


def timed(call: Callable[[], object], *, least_s: float = 0.0) -> Contender:
    """Return a contender that calls often enough to take `least_s`, and its mean.

    How often is found out here, so this makes a few calls.
    """

    def run(repeats: int) -> float:
        began_s = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - began_s

    return repeated(run, least_s=least_s)


def repeated(run: Callable[[int], float], *, least_s: float) -> Contender:
    """Return a contender that repeats often enough to take `least_s`, and its mean.

    `run` does so many repeats and returns the seconds of all of them.
    """
    run(1)  # finds cold caches
    repeats = max(1, round(least_s / max(run(1), 1e-7))) if least_s else 1
    return lambda: run(repeats) / repeats


def interleave(contenders: Mapping[str, Contender], *, rounds: int) -> dict[str, Times]:
    """Return the times of each contender, which all had their turn in every round.

    Raises ValueError when `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(contenders[name]())
    return {name: Times(tuple(its)) for name, its in seconds.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
