"""How fast a worker trains, from its recent tasks: an estimate with its spread.

The newest tasks weigh most, and a crumb weighs little. The middle counts, not the
mean: one task beside a busy neighbour changes nothing, and two in a row do. So do two
fast crumbs: a small task can hide how fast its worker is, not how slow. What the
worker measured of itself at its start (calibration) is no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.domain.figures import in_digits
from coordinator.domain.leases import HARD_FACTOR

#: So many of the newest tasks count, each for this share of the one after it.
NUM_RECENT: Final = 8
DECAY: Final = 0.7
#: Where the newest tasks, so many, were all so many times as fast as the middle of all,
#: they count, however small: else a slow worker's crumbs could never prove it faster.
NUM_PROOF: Final = 2
FASTER: Final = 2.0
#: Mean deviation to be expected of a worker that nobody knows.
UNKNOWN_SPREAD: Final = 1.0
#: A task may take so many mean deviations longer than predicted ...
HEAD_SPREADS: Final = 4.0
#: ... and at least so many times the prediction, however steady the worker is.
MIN_HEAD_ROOM: Final = 1.5
#: Durations are compared with predictions over so many of the newest tasks ...
NUM_COMPARED: Final = 5
#: ... once there are so many; beyond these ratios the predictions are wrong.
MIN_COMPARED: Final = 3
LEAST_RATIO, MOST_RATIO = 0.33, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one lease came to: tokens, and the seconds from its claim that they took."""

    tokens: int
    seconds: float
    #: Tokens of the task, and how long all of them should have taken.
    num_tokens: int
    predicted_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """A measured speed; `spread` is the mean deviation from it, as a share."""

    tokens_per_s: float
    spread: float


def waited_s(*, elapsed_s: float, paused_s: float, compute_s: float) -> float:
    """Return how much of a pause of the coordinator a worker waited, in a whole task.

    It computes on while nobody answers it; for how long it did, it says itself.
    """
    return max(0.0, min(paused_s, elapsed_s - compute_s))


def measured(recent: Sequence[Trained]) -> Throughput | None:
    """Return the throughput of a worker by its recent tasks, newest first.

    None before any. Tasks that are not there yet count as `UNKNOWN_SPREAD`.
    """
    known = list(recent)[:NUM_RECENT]
    if not known:
        return None
    speeds = [one.tokens / max(one.seconds, 1e-3) for one in known]
    weights = [DECAY**age * one.tokens for age, one in enumerate(known)]
    middle = _middle(speeds, weights)
    lately = min(speeds[:NUM_PROOF])
    if lately > FASTER * middle:
        middle = lately
    deviations = [abs(math.log(speed / middle)) for speed in speeds]
    mean = sum(w * d for w, d in zip(weights, deviations, strict=True)) / sum(weights)
    unknown = DECAY ** len(known)
    return Throughput(
        tokens_per_s=middle,
        spread=unknown * UNKNOWN_SPREAD + (1.0 - unknown) * mean,
    )


def _middle(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted median: half of the weight is at or below it."""
    left = sum(weights) / 2.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        left -= weight
        if left <= 0.0:
            return value
    return max(values)


def head_room(spread: float | None) -> float:
    """Return how many times its prediction a task may take; None: nobody knows yet."""
    if spread is None:
        return HARD_FACTOR
    return min(HARD_FACTOR, max(MIN_HEAD_ROOM, 1.0 + HEAD_SPREADS * spread))


def duration_ratio(recent: Sequence[Trained]) -> float | None:
    """Return how many times their prediction recent tasks took, newest first.

    The median; None before `MIN_COMPARED` tasks with a prediction.
    """
    ratios = sorted(actual / predicted for actual, predicted in durations(recent))
    return ratios[len(ratios) // 2] if len(ratios) >= MIN_COMPARED else None


def durations(recent: Sequence[Trained]) -> list[tuple[float, float]]:
    """Return actual and predicted seconds of the tasks that are compared.

    A task that was not finished counts as if it had gone on at its pace.
    """
    pairs = [
        (one.seconds * one.num_tokens / one.tokens, one.predicted_s)
        for one in recent
        if one.predicted_s
    ]
    return pairs[:NUM_COMPARED]


def is_alarming(ratio: float | None) -> bool:
    """Return whether predictions with this ratio of durations are wrong."""
    return ratio is not None and not LEAST_RATIO <= ratio <= MOST_RATIO


def ratio_alarm(ratio: float, recent: Sequence[Trained]) -> str:
    """Return the sentence that says how wrong the predictions for a worker are."""
    pairs = "; ".join(
        f"{in_digits(actual, 3)} s, predicted {in_digits(predicted, 3)} s"
        for actual, predicted in durations(recent)
    )
    return (
        f"Its tasks take {in_digits(ratio, 2)} times as long as predicted "
        f"(limits {LEAST_RATIO:g} and {MOST_RATIO:g}). The last ones: {pairs}."
    )
