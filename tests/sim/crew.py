"""Who is in a fleet that learns, what they hold, and what a run has used."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.domain import guards
from coordinator.domain.sizing import BLOCK_SIZE
from coordinator.domain.throughput import NUM_RECENT, Trained
from tests.sim.steps import Moments

Vector = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Worker:
    """One virtual worker."""

    speed: float
    moments: Moments
    tokens_per_s: float | None = None
    #: What its last tasks came to, newest first.
    recent: deque[Trained] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    residual: Vector | None = None
    #: The version it has the weights of; None: none.
    held: int | None = None
    #: The blocks that it has the text of.
    blocks: range = range(0)
    #: When it can claim again.
    free_at: float = 0.0
    #: Whether each of its submissions was left out, oldest first.
    left_out: list[bool] = field(default_factory=list)

    def has_text(self, stretch: Stretch) -> bool:
        """Return whether a task needs no text but what is held; then it is held."""
        first, end = stretch.start, stretch.start + stretch.num
        needed = range(first // BLOCK_SIZE, -(-end // BLOCK_SIZE))
        if needed.start in self.blocks and needed[-1] in self.blocks:
            return True
        self.blocks = needed
        return False

    @property
    def is_quarantined(self) -> bool:
        """Whether it gets no more work."""
        return guards.keeps_failing(self.left_out)


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """Consecutive windows of an epoch."""

    epoch: int
    start: int
    num: int


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One task of a round, and how it will end."""

    worker: Worker
    stretch: Stretch
    claimed_at: float
    #: How many of its windows are trained on which weights, in order.
    bases: tuple[tuple[int, Vector], ...]
    #: When its submission is accepted; None where the worker dies.
    back_at: float | None
    #: When its lease is over without a submission.
    over_at: float


@dataclass(slots=True)
class Counts:
    """What a run has used."""

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_up_fp32: int = 0
    bytes_down_fp32: int = 0
    num_text_requests: int = 0
    num_rounds: int = 0
    num_lost: int = 0
    #: Submissions that the guards left out, of honest workers and of the poisoned.
    num_honest_left_out: int = 0
    num_poison_left_out: int = 0
    num_clipped: int = 0
    #: Worker seconds that went into work that was applied.
    useful_s: float = 0.0
    #: Windows applied, and those of them that were of the version before.
    num_windows: int = 0
    num_stale: int = 0
    optimiser_s: float = 0.0
    curve: list[tuple[float, int, float]] = field(default_factory=list)
