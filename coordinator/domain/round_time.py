"""How long the tasks of the next round should take; pure arithmetic.

In each round time goes to other things than training: transfer, preparing, the step of
the coordinator, now and then an evaluation. That is its overhead, and it hardly depends
on the round time. So the round time is the shortest of which the overhead is a small
share, and in which the slowest worker can still do a task that is of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.figures import in_digits
from coordinator.domain.plan import AUTO, Aggregation, TrainingPlan

#: The round time of a run that begins, within its bounds.
FIRST_S: Final = 60.0
#: The middle of so many of the newest rounds counts ...
NUM_ROUNDS: Final = 5
#: ... once there are so many: in a first one much is done for the first time.
MIN_ROUNDS: Final = 3
#: A round time is chosen so that the overhead is at most this share of it ...
AIM: Final = 0.04
#: ... and stays as it is while what is wanted is between these multiples of it: an
#: overhead of 3 to 5 %.
KEEP: Final = (0.75, 1.25)
#: It changes by at most this factor from round to round.
MAX_CHANGE: Final = 2.0
#: A round time is chosen from these, times 1, 10 or 100 seconds. Neighbours differ by a
#: third at most, so what was rounded up is kept.
READABLE: Final = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
#: Local steps of the middle worker in a delta round, at least: with fewer, momentum
#: and rate of the outer step would have to be others.
MIN_MIDDLE_STEPS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one submission took."""

    tokens: int
    #: From the claim to its acceptance, by the coordinator's clock.
    elapsed_s: float
    #: Of that in training, as its worker says.
    compute_s: float
    #: Whether its size was given, so that no round time makes the task shorter.
    fixed_size: bool

    @property
    def trained_s(self) -> float:
        """Return the seconds of training: no more than there were."""
        return min(self.compute_s, self.elapsed_s)

    @property
    def overhead_s(self) -> float:
        """Return all other seconds: transfer, preparing, coding."""
        return self.elapsed_s - self.trained_s

    def needed_s(self, tokens: int) -> float:
        """Return the seconds that its worker needs for a task of so many tokens."""
        if self.fixed_size:
            return self.elapsed_s
        return self.overhead_s + self.trained_s / self.tokens * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a closed round says about the round time."""

    #: Seconds in which it did other things than training.
    overhead_s: float
    #: The shortest round time in which everybody could do a task of use.
    shortest_s: float


def measured(
    works: Sequence[Work],
    *,
    merge_s: float,
    evaluation_s: float,
    plan: TrainingPlan,
    seq_len: int,
) -> Measured | None:
    """Return what a round says that closed with these submissions; None without any.

    `merge_s` went by from its last claim to the version, `evaluation_s` is what the
    score of a version takes. The middle worker counts, so that none decides for all.
    """
    if not works:
        return None
    scoring_s = evaluation_s / plan.evaluate_every / len(works)
    return Measured(
        overhead_s=median(one.overhead_s for one in works) + merge_s + scoring_s,
        shortest_s=_shortest_s(works, plan, seq_len),
    )


def _shortest_s(works: Sequence[Work], plan: TrainingPlan, seq_len: int) -> float:
    """Return in what time the slowest does one local step, the middle one enough.

    A task of a gradient round is of use with one sequence. A round waits for all that
    was claimed, so a shorter time would only make the others wait.
    """
    step = plan.batch_size * seq_len
    is_delta = plan.round_kind is RoundKind.DELTA
    unit, num_steps = (step, MIN_MIDDLE_STEPS) if is_delta else (seq_len, 0)
    slowest_s = max(one.needed_s(unit) for one in works)
    return max(slowest_s, median(one.needed_s(num_steps * step) for one in works))


def first_round_s(plan: TrainingPlan) -> float:
    """Return the round time of the first round of a run."""
    return _bounded(plan, FIRST_S) if plan.round_s == AUTO else plan.round_s


def next_round_s(
    plan: TrainingPlan, before_s: float, rounds: Sequence[Measured]
) -> float:
    """Return the round time after one of `before_s`; `rounds`: oldest first."""
    if plan.round_s != AUTO:
        return plan.round_s
    before_s = _bounded(plan, before_s)
    wanted_s = _wanted_s(rounds)
    if wanted_s is None or _is_kept(before_s, wanted_s):
        return before_s
    chosen_s = min(_readable(wanted_s), MAX_CHANGE * before_s)
    return _bounded(plan, max(chosen_s, before_s / MAX_CHANGE))


def usual(rounds: Sequence[Measured]) -> Measured | None:
    """Return the middle of the newest rounds, oldest first; None before any."""
    newest = rounds[-NUM_ROUNDS:]
    if not newest:
        return None
    return Measured(
        overhead_s=median(one.overhead_s for one in newest),
        shortest_s=median(one.shortest_s for one in newest),
    )


def reason(plan: TrainingPlan, round_s: float, rounds: Sequence[Measured]) -> str:
    """Return why the round time is what it is, in a sentence or two."""
    return f"{_told_overhead(round_s, rounds)} {_told_choice(plan, rounds)}"


def _told_overhead(round_s: float, rounds: Sequence[Measured]) -> str:
    found = usual(rounds)
    if found is None:
        return "Overhead not measured yet."
    share = 100.0 * found.overhead_s / round_s
    overhead = in_digits(found.overhead_s, 2)
    return f"Overhead {overhead} s of {round_s:g} s = {in_digits(share, 2)} %."


def _told_choice(plan: TrainingPlan, rounds: Sequence[Measured]) -> str:
    if plan.round_s != AUTO:
        return "Fixed."
    if plan.aggregation is Aggregation.PER_ARRIVAL:
        return "Not measured, as each submission makes a version."
    bounds = f"between {plan.round_min_s:g} and {plan.round_max_s:g} s"
    if len(rounds) < MIN_ROUNDS:
        return f"Chosen {bounds} once {MIN_ROUNDS} rounds are measured."
    found = usual(rounds)
    if found is not None and found.shortest_s > found.overhead_s / AIM:
        return f"Tasks need {in_digits(found.shortest_s, 2)} s; chosen {bounds}."
    return f"Chosen {bounds}."


def _wanted_s(rounds: Sequence[Measured]) -> float | None:
    """Return the shortest round time that will do; None before enough rounds."""
    found = usual(rounds)
    if found is None or len(rounds) < MIN_ROUNDS:
        return None
    return max(found.overhead_s / AIM, found.shortest_s)


def _is_kept(before_s: float, wanted_s: float) -> bool:
    low, high = KEEP
    return low * before_s <= wanted_s <= high * before_s


def _readable(seconds: float) -> float:
    """Return the next readable round time that is not below."""
    unit = 1.0
    while seconds > 10.0 * unit:
        unit *= 10.0
    return next((unit * one for one in READABLE if unit * one >= seconds), 10.0 * unit)


def _bounded(plan: TrainingPlan, seconds: float) -> float:
    return min(max(seconds, plan.round_min_s), plan.round_max_s)
