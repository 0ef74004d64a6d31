"""Where a run is in the schedule of its plan, and why it may have none; pure."""

from __future__ import annotations

import math
from enum import StrEnum

from coordinator.domain.plan import TrainingPlan, has_stages, second_stage_tokens


class Stage(StrEnum):
    """What the learning rate does now."""

    WARM_UP = "warm-up"  #: rises to its peak
    FIRST = "first stage"  #: falls slowly
    SECOND = "second stage"  #: falls to zero; weights no longer decay
    CONSTANT = "constant"  #: stays at its peak for good, without a schedule
    OVER = "over"  #: is zero: the schedule has ended


def stage_at(plan: TrainingPlan, tokens_accepted: int) -> tuple[Stage, int | None]:
    """Return the stage after so many accepted tokens, and at how many it ends.

    None: it has no end.
    """
    ends = [(Stage.WARM_UP, plan.warmup_tokens)]
    second = second_stage_begins(plan)
    if second is not None and plan.schedule_tokens:
        ends += [(Stage.FIRST, second), (Stage.SECOND, plan.schedule_tokens)]
    for stage, end in ends:
        if tokens_accepted < end:
            return stage, end
    return (Stage.CONSTANT if second is None else Stage.OVER), None


def second_stage_begins(plan: TrainingPlan) -> int | None:
    """Return the first number of accepted tokens that is in the second stage."""
    begins = second_stage_tokens(plan)
    return None if math.isinf(begins) else math.ceil(begins)


def constant_reason(plan: TrainingPlan, token_budget: int | None) -> str | None:
    """Return why the rate stays at its peak, in a sentence; None: it has a schedule."""
    if plan.schedule_tokens:
        return None
    if not token_budget:
        return "No token budget is set."
    if not has_stages(plan, token_budget):
        return (
            f"The run is too short for a schedule: with {token_budget} tokens its "
            f"second stage would begin within the warm-up of {plan.warmup_tokens}."
        )
    return "The plan has no schedule (schedule_tokens is 0)."
