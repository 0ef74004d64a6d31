"""The rule that chooses variant, threads and micro-batch, on made-up times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from worker.tune import (
    CLEARLY_WORSE,
    MAX_SECONDS,
    PORTABLE,
    TORCH,
    Choices,
    Setup,
    Trial,
    fastest,
    halvings,
    is_settled,
    next_setup,
    tune,
    variants,
)

CHOICES = Choices(
    variants=("quick", "slow", "slower"), threads=(4, 2, 1), micro_batches=(8, 4, 2, 1)
)


class Machine:
    """Takes so long for a step as `cost` says, on a clock of its own."""

    def __init__(self, cost: Callable[[Setup], float]) -> None:
        self.now_s = 100.0
        self.to_beat: list[float | None] = []
        self._cost = cost

    def clock(self) -> float:
        return self.now_s

    def measure(self, setup: Setup, to_beat_s: float | None) -> tuple[float, ...]:
        self.to_beat.append(to_beat_s)
        seconds = self._cost(setup)
        self.now_s += 2 * seconds
        return (seconds, seconds)

    def tried(self, choices: Choices = CHOICES) -> list[tuple[str, int, int]]:
        trials = tune(choices, self.measure, self.clock)
        return [(t.setup.variant, t.setup.threads, t.setup.micro_batch) for t in trials]


def cost_of(**seconds: dict[str | int, float]) -> Callable[[Setup], float]:
    """Return a cost that adds up what each part of a setup takes."""
    return lambda setup: sum(its[getattr(setup, name)] for name, its in seconds.items())


def test_everything_is_tried_from_the_likeliest_on_until_it_gets_slower() -> None:
    machine = Machine(
        cost_of(
            variant={"quick": 0.1, "slow": 0.2, "slower": 0.3},
            threads={4: 0.2, 2: 0.1, 1: 0.3},
            micro_batch={8: 0.4, 4: 0.3, 2: 0.2, 1: 0.9},
        )
    )

    assert machine.tried() == [
        ("quick", 4, 8),
        ("slow", 4, 8),
        ("quick", 2, 8),
        ("quick", 1, 8),
        ("quick", 2, 4),
        ("quick", 2, 2),
        ("quick", 2, 1),
    ]


def test_the_first_setup_stays_where_nothing_else_is_faster() -> None:
    machine = Machine(
        cost_of(
            variant={"quick": 0.1, "slow": 0.2},
            threads={4: 0.1, 2: 0.2},
            micro_batch={8: 0.1, 4: 0.2},
        )
    )

    trials = tune(CHOICES, machine.measure, machine.clock)

    assert fastest(trials) is trials[0]
    assert len(trials) == 4


def test_what_is_fixed_is_not_tuned() -> None:
    machine = Machine(cost_of(threads={3: 0.1}))
    fixed = Choices(variants=("avx2",), threads=(3,), micro_batches=(1,))

    assert machine.tried(fixed) == [("avx2", 3, 1)]


def test_each_setup_is_told_the_step_of_the_best_before_it() -> None:
    machine = Machine(
        cost_of(
            variant={"quick": 0.4, "slow": 0.2, "slower": 0.9},
            threads={4: 0.0, 2: 0.1},
            micro_batch={8: 0.0, 4: 0.3},
        )
    )

    machine.tried()

    assert machine.to_beat == [None, 0.4, 0.2, 0.2, 0.2]


def test_a_slow_machine_tries_one_setup_and_no_more() -> None:
    machine = Machine(lambda _setup: MAX_SECONDS)

    assert machine.tried() == [("quick", 4, 8)]


def test_nothing_begins_that_would_end_after_the_time_is_up() -> None:
    machine = Machine(lambda setup: 1.0 + 1.0 / (setup.threads * setup.micro_batch))

    trials = tune(CHOICES, machine.measure, machine.clock)

    assert len(trials) > 1
    assert machine.now_s - 100.0 <= MAX_SECONDS + 1.0
    assert next_setup(CHOICES, trials[:1], MAX_SECONDS) is None


@pytest.mark.parametrize(("gain", "chosen"), [(1.0, 0), (1.04, 0), (1.06, 1)])
def test_a_setup_must_win_by_more_than_noise_to_replace_a_likelier(
    gain, chosen
) -> None:
    setups = [Setup(variant="a", threads=n, micro_batch=1) for n in (2, 1)]
    trials = [Trial(setups[0], (0.5, 0.4)), Trial(setups[1], (0.4 / gain, 0.6))]

    assert fastest(trials) is trials[chosen]


def test_a_trial_counts_by_its_fastest_step_and_promises_its_mean() -> None:
    setup = Setup(variant="a", threads=1, micro_batch=1)
    trial = Trial(setup, (0.9, 0.2, 0.4))

    assert trial.step_s == 0.2
    assert trial.mean_s == pytest.approx(0.5)


def test_a_setup_is_settled_once_its_best_step_is_clearly_worse() -> None:
    limit = 0.2 * CLEARLY_WORSE

    assert is_settled([limit + 0.01], 0.2)
    assert not is_settled([limit + 0.01, 0.25], 0.2)
    assert not is_settled([limit], 0.2)
    assert not is_settled([9.9], None)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (8, (8, 4, 2, 1)), (6, (6, 3, 1))]
)
def test_halvings_go_down_to_one(most, expected) -> None:
    assert halvings(most) == expected


def test_the_portable_variant_competes_with_torch_and_only_where_it_is_alone() -> None:
    assert variants([PORTABLE]) == (PORTABLE, TORCH)
    assert variants([PORTABLE, "avx2", "avx512vnni"]) == ("avx512vnni", "avx2")
