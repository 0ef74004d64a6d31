"""The numbers of a run: checked when decoded, a schedule that goes by tokens."""

from __future__ import annotations

import msgspec
import pytest

from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from coordinator.domain.plan import (
    TrainingPlan,
    hyper_parameters,
    learning_rate_at,
    scheduled,
    step_sizes,
    weight_decay_at,
)

PLAN = TrainingPlan(learning_rate=1e-3, warmup_tokens=1000)
TWO_STAGES = msgspec.structs.replace(
    PLAN, schedule_tokens=10_000, second_stage_at=0.6, second_stage_rate=0.5
)


@pytest.mark.parametrize(
    ("tokens", "due"), [(0, 0.0), (250, 0.25e-3), (1000, 1e-3), (10**12, 1e-3)]
)
def test_the_rate_rises_linearly_and_then_stays(tokens, due):
    assert learning_rate_at(PLAN, tokens) == pytest.approx(due)


def test_without_warm_up_the_rate_is_there_at_once():
    plan = msgspec.structs.replace(PLAN, warmup_tokens=0)

    assert learning_rate_at(plan, 0) == 1e-3


@pytest.mark.parametrize(
    ("tokens", "due"),
    [
        (500, 0.5e-3),
        (1000, 1e-3),
        (3500, 0.75e-3),
        (6000, 0.5e-3),
        (8000, 0.25e-3),
        (10_000, 0.0),
        (10**12, 0.0),
    ],
)
def test_a_schedule_goes_linearly_from_corner_to_corner(tokens, due):
    assert learning_rate_at(TWO_STAGES, tokens) == pytest.approx(due)


def test_weights_decay_in_the_first_stage_only():
    assert weight_decay_at(TWO_STAGES, 5999) == 0.1
    assert weight_decay_at(TWO_STAGES, 6000) == 0.0
    assert (
        hyper_parameters(TWO_STAGES, tokens_accepted=6000, task_tokens=100).weight_decay
        == 0.0
    )


@pytest.mark.parametrize(
    ("chosen", "budget", "due"),
    [
        (None, 2001, 2001),
        (None, 2000, 0),  # it would be warming up until the second stage
        (None, 0, 0),
        (0, 5000, 0),
        (5000, 5000, 5000),
        (6000, 5000, 6000),
    ],
)
def test_the_rate_is_back_at_zero_when_the_run_ends_if_nobody_says_otherwise(
    chosen, budget, due
):
    plan = msgspec.structs.replace(PLAN, schedule_tokens=chosen)

    assert scheduled(plan, budget) == msgspec.structs.replace(plan, schedule_tokens=due)


@pytest.mark.parametrize("budget", [0, 5001])
def test_a_schedule_that_ends_before_its_run_is_refused(budget):
    plan = msgspec.structs.replace(PLAN, schedule_tokens=5000)

    with pytest.raises(ValueError, match=r"schedule_tokens \(5000\) must be 0"):
        scheduled(plan, budget)


def test_without_a_schedule_weights_decay_for_good():
    assert weight_decay_at(PLAN, 10**12) == 0.1


def test_a_task_goes_on_where_the_one_before_it_ended():
    first = hyper_parameters(PLAN, tokens_accepted=0, task_tokens=400)
    second = hyper_parameters(PLAN, tokens_accepted=400, task_tokens=400)

    assert first.lr_start == 0.0
    assert first.lr_end == second.lr_start == pytest.approx(0.4e-3)
    assert (first.beta1, first.weight_decay) == (PLAN.beta1, PLAN.weight_decay)


def test_a_task_is_given_the_optimiser_of_the_plan():
    plan = msgspec.structs.replace(
        PLAN, local_optimiser=Optimiser.ADAMW, local_momentum=0.7, beta2=0.9
    )

    given = hyper_parameters(plan, tokens_accepted=0, task_tokens=400)

    assert (given.optimiser, given.momentum) == (Optimiser.ADAMW, 0.7)
    assert (given.beta2, given.eps) == (0.9, PLAN.eps)


def test_a_task_of_a_gradient_round_is_given_the_clip_norm_alone():
    plan = msgspec.structs.replace(PLAN, round_kind=RoundKind.GRADIENT, clip_norm=2.0)

    given = hyper_parameters(plan, tokens_accepted=0, task_tokens=400)

    assert msgspec.to_builtins(given) == {"clip_norm": 2.0}


def test_a_gradient_step_takes_the_rate_of_the_middle_of_its_round():
    first = step_sizes(TWO_STAGES, tokens_before=0, tokens=500, step=1)
    last = step_sizes(TWO_STAGES, tokens_before=9000, tokens=1000, step=7)

    assert (first.rate, first.decay, first.step) == (pytest.approx(0.25e-3), 0.1, 1)
    assert (last.rate, last.decay, last.step) == (pytest.approx(0.0625e-3), 0.0, 7)
    assert first.momentum == TWO_STAGES.outer_momentum
    assert (first.beta1, first.beta2, first.eps) == (PLAN.beta1, PLAN.beta2, PLAN.eps)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round_kind", "gradients"),
        ("learning_rate", 0.0),
        ("warmup_tokens", -1),
        ("schedule_tokens", -1),
        # Its second stage would begin within the warm-up of 100,000 tokens.
        ("schedule_tokens", 200_000),
        ("second_stage_at", 1.0),
        ("second_stage_rate", 0.0),
        ("second_stage_rate", 1.1),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("clip_norm", 0.0),
        ("outer_rate", 0.0),
        ("outer_momentum", 1.0),
        ("batch_size", 0),
        ("round_s", 0.0),
        ("round_s", "Auto"),
        ("round_min_s", 601.0),
        ("round_max_s", 9.0),
        ("codec", "int4"),
        ("codec", "int8\n"),
        ("evaluate_every", 0),
        ("learning_rat", 1.0),
        # JSON has no infinity, so a plan that holds one could not be read again.
        ("learning_rate", float("inf")),
        ("eps", float("nan")),
        ("round_s", float("inf")),
        ("weight_decay", float("inf")),
        ("beta1", float("nan")),
    ],
)
def test_a_plan_out_of_range_is_refused_and_the_field_named(field, value):
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({field: value}, TrainingPlan)


@pytest.mark.parametrize(
    ("field", "value"),
    [("round_kind", "gradient"), ("outer_momentum", 0.8), ("quorum", 0.5)],
)
def test_arrivals_refuse_what_only_rounds_can_have(field, value):
    fine = {"aggregation": "per-arrival", "outer_momentum": 0.0}

    assert msgspec.convert(fine, TrainingPlan).outer_momentum == 0.0
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert(fine | {field: value}, TrainingPlan)


def test_a_plan_survives_being_stored():
    stored = msgspec.json.encode(PLAN)

    assert msgspec.json.decode(stored, type=TrainingPlan) == PLAN
