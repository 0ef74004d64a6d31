"""The stage of a run agrees with its rate and decay, and names where it ends."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.domain.plan import (
    TrainingPlan,
    learning_rate_at,
    scheduled,
    weight_decay_at,
)
from coordinator.domain.stages import (
    Stage,
    constant_reason,
    second_stage_begins,
    stage_at,
)

NO_SCHEDULE = TrainingPlan(learning_rate=1e-3, warmup_tokens=1000)
TWO_STAGES = msgspec.structs.replace(
    NO_SCHEDULE, schedule_tokens=10_000, second_stage_at=0.6, second_stage_rate=0.5
)
#: Its second stage begins at 3000.3 tokens.
UNEVEN = msgspec.structs.replace(
    NO_SCHEDULE, schedule_tokens=10_001, second_stage_at=0.3
)


@pytest.mark.parametrize(
    ("plan", "tokens", "due"),
    [
        (TWO_STAGES, 0, (Stage.WARM_UP, 1000)),
        (TWO_STAGES, 999, (Stage.WARM_UP, 1000)),
        (TWO_STAGES, 1000, (Stage.FIRST, 6000)),
        (TWO_STAGES, 5999, (Stage.FIRST, 6000)),
        (TWO_STAGES, 6000, (Stage.SECOND, 10_000)),
        (TWO_STAGES, 9999, (Stage.SECOND, 10_000)),
        (TWO_STAGES, 10_000, (Stage.OVER, None)),
        (NO_SCHEDULE, 999, (Stage.WARM_UP, 1000)),
        (NO_SCHEDULE, 1000, (Stage.CONSTANT, None)),
        (UNEVEN, 3000, (Stage.FIRST, 3001)),
        (UNEVEN, 3001, (Stage.SECOND, 10_001)),
    ],
)
def test_a_stage_is_named_with_the_tokens_that_end_it(plan, tokens, due):
    assert stage_at(plan, tokens) == due


def test_without_a_warm_up_a_run_begins_with_what_comes_next():
    at_once = msgspec.structs.replace(NO_SCHEDULE, warmup_tokens=0)

    assert stage_at(at_once, 0) == (Stage.CONSTANT, None)


@pytest.mark.parametrize("plan", [NO_SCHEDULE, TWO_STAGES, UNEVEN])
def test_the_stage_says_what_rate_and_decay_do(plan):
    for tokens in range(0, 11_000, 7):
        stage, _ = stage_at(plan, tokens)
        change = learning_rate_at(plan, tokens + 1) - learning_rate_at(plan, tokens)
        match stage:
            case Stage.WARM_UP:
                assert change > 0
            case Stage.FIRST | Stage.SECOND:
                assert change < 0
            case Stage.CONSTANT | Stage.OVER:
                assert change == 0
        is_late = stage in (Stage.SECOND, Stage.OVER)
        assert (weight_decay_at(plan, tokens) == 0.0) == is_late


@pytest.mark.parametrize(
    ("plan", "due"), [(TWO_STAGES, 6000), (UNEVEN, 3001), (NO_SCHEDULE, None)]
)
def test_the_second_stage_begins_where_the_first_ends(plan, due):
    assert second_stage_begins(plan) == due


@pytest.mark.parametrize(
    ("chosen", "budget", "due"),
    [
        (None, 2001, None),
        (
            None,
            2000,
            "The run is too short for a schedule: with 2000 tokens its second stage "
            "would begin within the warm-up of 1000.",
        ),
        (None, 0, "No token budget is set."),
        (0, 5000, "The plan has no schedule (schedule_tokens is 0)."),
        (6000, 5000, None),
    ],
)
def test_a_rate_that_stays_at_its_peak_has_a_reason(chosen, budget, due):
    plan = msgspec.structs.replace(NO_SCHEDULE, schedule_tokens=chosen)

    assert constant_reason(scheduled(plan, budget), budget) == due
