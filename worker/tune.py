"""Which kernel variant, threads and micro-batch train fastest here: a pure rule.

One thing is looked at after the other, each from its likeliest value on, and with
what was best so far for the rest. The next value is tried as long as the latest one
is the best: what got slower on the way down never turned faster further down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

T = TypeVar("T")

#: The variant that does without our kernels: plain PyTorch.
TORCH: Final = "torch"
#: The variant that every CPU has; it is slow.
PORTABLE: Final = "portable"
#: Least steps that are timed, unless the first one settles it.
MIN_STEPS: Final = 2
#: A first step so many times slower than the best so far settles it.
CLEARLY_WORSE: Final = 2.0
#: So many times faster than a likelier setup, another takes its place: less is noise.
MIN_GAIN: Final = 1.05
#: Nothing is tried that would not be done so long after the start; the first setup
#: takes what it takes.
MAX_SECONDS: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a worker makes its steps; the result is the same but for rounding."""

    #: A variant of the kernels, or TORCH.
    variant: str
    threads: int
    #: Sequences that go through the model at a time.
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.variant}, threads {self.threads}, micro-batch {self.micro_batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be tried, the likeliest first; none is empty."""

    variants: Sequence[str]
    threads: Sequence[int]
    micro_batches: Sequence[int]


@dataclass(frozen=True, slots=True)
class Trial:
    """A setup and the seconds of its steps, at least one."""

    setup: Setup
    seconds: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """Of the fastest step: what it takes when nothing else wants the CPU."""
        return min(self.seconds)

    @property
    def mean_s(self) -> float:
        """Of all steps: what to expect."""
        return sum(self.seconds) / len(self.seconds)


#: Makes steps of a setup and returns their seconds. The number is the time of a step
#: of the best setup so far, None for the first one.
Measure = Callable[[Setup, float | None], tuple[float, ...]]


def tune(choices: Choices, measure: Measure, clock: Callable[[], float]) -> list[Trial]:
    """Return what was tried; `clock` gives monotonic seconds."""
    started_s = clock()
    trials: list[Trial] = []
    while setup := next_setup(choices, trials, clock() - started_s):
        to_beat_s = fastest(trials).step_s if trials else None
        trials.append(Trial(setup, measure(setup, to_beat_s)))
    return trials


def next_setup(
    choices: Choices, trials: Sequence[Trial], spent_s: float
) -> Setup | None:
    """Return what to try after `trials`, which took `spent_s`; None: it is settled."""
    if not trials:
        return Setup(
            variant=choices.variants[0],
            threads=choices.threads[0],
            micro_batch=choices.micro_batches[0],
        )
    best = fastest(trials)
    if spent_s + MIN_STEPS * best.step_s > MAX_SECONDS:
        return None
    now, tried = best.setup, [trial.setup for trial in trials]
    variant = _following(choices.variants, now.variant, {s.variant for s in tried})
    if variant is not None:
        return replace(now, variant=variant)
    threads = _following(choices.threads, now.threads, {s.threads for s in tried})
    if threads is not None:
        return replace(now, threads=threads)
    size = _following(
        choices.micro_batches, now.micro_batch, {s.micro_batch for s in tried}
    )
    return None if size is None else replace(now, micro_batch=size)


def _following(values: Sequence[T], best: T, tried: set[T]) -> T | None:
    """Return the value after the latest that was tried, if that one is the best."""
    latest = max(values.index(value) for value in tried)
    more = values[latest] == best and latest + 1 < len(values)
    return values[latest + 1] if more else None


def fastest(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the shortest step; of near equals the one tried first."""
    best = trials[0]
    for trial in trials:
        if trial.step_s * MIN_GAIN < best.step_s:
            best = trial
    return best


def is_settled(seconds: Sequence[float], to_beat_s: float | None) -> bool:
    """Say whether the steps so far show that this setup will not be the best."""
    return to_beat_s is not None and min(seconds) > CLEARLY_WORSE * to_beat_s


def halvings(most: int) -> tuple[int, ...]:
    """Return `most`, its half, and so on down to 1."""
    found = [most]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return tuple(found)


def variants(isas: Sequence[str]) -> tuple[str, ...]:
    """Return what to try of the variants that run here, whose fastest is the last.

    Where only the portable one does, plain PyTorch may be faster.
    """
    fast = tuple(isa for isa in reversed(isas) if isa != PORTABLE)
    return fast or (PORTABLE, TORCH)
