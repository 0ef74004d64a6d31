"""What may change in a run, how it is written, and what is refused by name."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.domain.plan import Aggregation, TrainingPlan, learning_rate_at
from coordinator.domain.plan_change import (
    CHANGEABLE,
    FIXED,
    Change,
    Planned,
    differences,
    planned,
    told,
)
from coordinator.domain.plan_words import DELTA_ONLY, WordError, plan_in_words
from tests.unit.coordinator.test_settings import GOOD_PLAN

PLAN = TrainingPlan(warmup_tokens=1000, schedule_tokens=10_000)
RUN = Planned(plan=PLAN, token_budget=10_000)
#: Run without an end, at its peak rate.
ENDLESS = Planned(plan=msgspec.structs.replace(PLAN, schedule_tokens=0), token_budget=0)


def ask(words, run=RUN, *, asked=None, accepted=0) -> Planned:
    return planned(words, in_force=run, asked=asked or run, tokens_accepted=accepted)


def changes(words, run=RUN, **more) -> str:
    return told(differences(run, ask(words, run, **more)))


def error_of(words, run=RUN, **more) -> str:
    with pytest.raises(WordError) as caught:
        ask(words, run, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [n for n in GOOD_PLAN if n.lower() not in {*FIXED, "round_kind"}]
)
def test_what_can_be_set_when_a_run_is_made_is_written_the_same_later(name):
    word, due = GOOD_PLAN[name]

    found = ask({name.lower(): word})

    assert getattr(found.plan, name.lower()) == due
    assert [change.name for change in differences(RUN, found)] == [name.lower()]


def test_there_is_no_field_that_is_neither_fixed_nor_changeable():
    fields = {*TrainingPlan.__struct_fields__, "token_budget"}

    assert {*CHANGEABLE, *FIXED} == fields
    assert not set(CHANGEABLE) & set(FIXED)


@pytest.mark.parametrize(
    ("words", "due"),
    [
        (
            {"learning_rate": "abc"},
            "learning_rate must be a number above 0, at most 1e+09, got 'abc'",
        ),
        ({"beta1": "nan"}, "beta1 must be a number from 0, below 1, got 'nan'"),
        ({"quorum": "2"}, "quorum must be a number above 0, at most 1, got '2'"),
        (
            {"evaluate_every": "0"},
            "evaluate_every must be a whole number from 1 to 4611686018427387904, "
            "got '0'",
        ),
        (
            {"schedule_tokens": "4611686018427387905"},
            "schedule_tokens must be a whole number from 0 to 4611686018427387904, "
            "got '4611686018427387905'",
        ),
        (
            {"warmup_tokens": "-1"},
            "warmup_tokens must be a whole number from 0 to 4611686018427387904, "
            "got '-1'",
        ),
        (
            {"warmup_tokens": "6000"},
            "warmup_tokens can't be '6000': the second stage, at second_stage_at (0.5) "
            "of schedule_tokens (10000), must begin after warmup_tokens (6000)",
        ),
        (
            {"batch_size": "0"},
            "batch_size must be a whole number from 1 to 4096, got '0'",
        ),
        (
            {"codec": "int4"},
            "codec must be one of ternary, int8, fp32, got 'int4'",
        ),
        (
            {"round_s": "soon"},
            "round_s must be auto or a number of seconds above 0, at most 1e+09, "
            "got 'soon'",
        ),
        (
            {"round_max_s": "5"},
            "round_max_s can't be '5': round_min_s (10) must be at most round_max_s "
            "(5)",
        ),
        (
            {"token_budget": "1e6"},
            "token_budget must be a whole number from 0 to 4611686018427387904, "
            "got '1e6'",
        ),
        (
            {"schedule_tokens": "9999"},
            "schedule_tokens can't be '9999': schedule_tokens (9999) must be 0 or at "
            "least token_budget (10000)",
        ),
        (
            {"round_kind": "gradients"},
            "round_kind must be one of delta, gradient, got 'gradients'",
        ),
        (
            {"round_kind": "gradient"},
            "round_kind=gradient needs learning_rate=RATE in the same command: usual "
            "are 0.002 for delta, 0.02 for gradient, and it is 0.002",
        ),
        (
            {"aggregation": "per-arrival"},
            "aggregation is fixed for a run, as what is out was claimed for rounds of "
            "the other kind: to train with 'per-arrival', begin another run in "
            "another data folder",
        ),
    ],
)
def test_what_is_refused_names_field_and_value(words, due):
    assert error_of(words) == due


@pytest.mark.parametrize("name", ["lr", "LEARNING_RATE", "preset", "seed", ""])
def test_a_name_that_there_is_not_is_shown_with_those_that_there_are(name):
    assert error_of({name: "1"}) == (
        f"{name} can't be set in a run; there are {', '.join(CHANGEABLE)}"
    )


def test_what_is_fixed_may_be_named_as_it_is():
    assert ask({"round_kind": "delta", "aggregation": "rounds"}) == RUN


def test_the_kind_of_round_changes_with_a_rate_of_its_own():
    words = {"round_kind": "gradient", "learning_rate": "0.02"}

    assert changes(words) == "round_kind delta -> gradient, learning_rate 0.002 -> 0.02"
    # The rate that there is may be meant, if it is said.
    assert changes({"round_kind": "gradient", "learning_rate": "0.002"}) == (
        "round_kind delta -> gradient"
    )


def test_a_kind_that_is_taken_back_takes_a_rate_of_its_own_too():
    asked = ask({"round_kind": "gradient", "learning_rate": "0.02"})

    assert error_of({"round_kind": "delta"}, asked=asked) == (
        "round_kind=delta needs learning_rate=RATE in the same command: usual are "
        "0.002 for delta, 0.02 for gradient, and it is 0.02"
    )
    assert ask({"round_kind": "gradient"}, asked=asked) == asked
    assert ask({"round_kind": "delta", "learning_rate": "2e-3"}, asked=asked) == RUN


@pytest.mark.parametrize("name", DELTA_ONLY)
def test_what_gradient_rounds_have_none_of_is_refused_there(name):
    word, _ = GOOD_PLAN[name.upper()]
    gradients = ask({"round_kind": "gradient", "learning_rate": "0.02"})
    back = {"round_kind": "delta", "learning_rate": "0.002", name: word}

    assert error_of({name: word}, asked=gradients) == (
        f"{name} means nothing in gradient rounds, got {word!r}"
    )
    assert [change.name for change in differences(RUN, ask(back, asked=gradients))] == [
        name
    ]


def test_arrivals_still_lack_what_only_rounds_have():
    plan = TrainingPlan(aggregation=Aggregation.PER_ARRIVAL, outer_momentum=0.0)
    run = Planned(plan=plan, token_budget=0)

    assert error_of({"round_kind": "gradient", "learning_rate": "0.02"}, run) == (
        "round_kind can't be 'gradient': round_kind must be delta with aggregation "
        "per-arrival"
    )

    assert error_of({"quorum": "0.5"}, run) == (
        "quorum can't be '0.5': quorum must be 1.0 with aggregation per-arrival"
    )


def test_wishes_add_up_and_what_is_set_back_is_no_change():
    first = ask({"learning_rate": "0.001", "codec": "ternary"})
    second = ask({"quorum": "0.5", "codec": "int8"}, asked=first)

    assert told(differences(RUN, second)) == (
        "learning_rate 0.002 -> 0.001, quorum 1 -> 0.5"
    )
    assert ask({"quorum": "1", "learning_rate": "2e-3"}, asked=second) == RUN


def test_a_change_is_shown_with_all_of_its_digits():
    assert str(Change(name="eps", before=1e-8, after=0.0012345678)) == (
        "eps 1e-08 -> 0.0012345678"
    )
    assert str(Change(name="token_budget", before=10**17 + 1, after=0)) == (
        "token_budget 100000000000000001 -> 0"
    )


# -- the token budget, and the schedule that follows it --------------------------


def test_a_schedule_that_ends_with_the_run_still_does():
    assert changes({"token_budget": "20000"}) == (
        "schedule_tokens 10000 -> 20000, token_budget 10000 -> 20000"
    )
    assert changes({"token_budget": "0"}) == (
        "schedule_tokens 10000 -> 0, token_budget 10000 -> 0"
    )
    # Half of it would be warming up.
    assert changes({"token_budget": "2000"}) == (
        "schedule_tokens 10000 -> 0, token_budget 10000 -> 2000"
    )


def test_a_run_that_gets_an_end_gets_the_schedule_of_one():
    assert changes({"token_budget": "20000"}, ENDLESS) == (
        "schedule_tokens 0 -> 20000, token_budget 0 -> 20000"
    )


def test_a_schedule_of_its_own_stays_and_has_to_reach_the_end():
    plan = msgspec.structs.replace(PLAN, schedule_tokens=15_000)
    own = Planned(plan=plan, token_budget=10_000)
    constant = Planned(plan=ENDLESS.plan, token_budget=10_000)

    assert changes({"token_budget": "12000"}, own) == "token_budget 10000 -> 12000"
    assert changes({"token_budget": "90000"}, constant) == (
        "token_budget 10000 -> 90000"
    )
    assert error_of({"token_budget": "15001"}, own) == (
        "token_budget can't be '15001': schedule_tokens (15000) must be 0 or at least "
        "token_budget (15001)"
    )
    assert changes({"token_budget": "15001", "schedule_tokens": "0"}, own) == (
        "schedule_tokens 15000 -> 0, token_budget 10000 -> 15001"
    )


def test_a_plan_that_was_wrong_before_is_named_by_its_own_field():
    plan = msgspec.structs.replace(PLAN, schedule_tokens=15_000)
    endless = Planned(plan=plan, token_budget=0)

    assert error_of({"quorum": "0.5"}, endless) == (
        "schedule_tokens: schedule_tokens (15000) must be 0, as token_budget (0) is no "
        "end"
    )


def test_a_schedule_that_is_named_with_the_budget_counts():
    words = {"token_budget": "20000", "schedule_tokens": "30000"}

    assert ask(words).plan.schedule_tokens == 30_000
    # Before the longer budget was known, its warm-up would have been too long.
    longer = ask({"warmup_tokens": "8000", "token_budget": "20000"})
    assert longer.plan.schedule_tokens == 20_000


def test_a_budget_that_is_taken_back_takes_its_schedule_back():
    longer = ask({"token_budget": "20000"})

    assert ask({"token_budget": "10000"}, asked=longer) == RUN


def test_a_budget_is_never_less_than_what_is_accepted():
    assert ask({"token_budget": "4000"}, accepted=4000).token_budget == 4000
    assert error_of({"token_budget": "3999"}, accepted=4000) == (
        "token_budget must be 0 (no end) or at least 4000, which are accepted already, "
        "got '3999'"
    )


def test_the_rate_of_a_longer_run_is_that_of_a_run_which_was_as_long_from_the_start():
    longer = ask({"token_budget": "20000"}, accepted=10_000).plan

    assert learning_rate_at(PLAN, 10_000) == 0.0
    assert learning_rate_at(longer, 10_000) == pytest.approx(0.667 * 0.002)
    assert learning_rate_at(longer, 20_000) == 0.0


def test_a_plan_of_before_with_larger_steps_is_read_and_may_change_in_all_else():
    before = TrainingPlan(batch_size=5000)
    stored = msgspec.json.decode(msgspec.json.encode(before), type=TrainingPlan)

    after = plan_in_words({"learning_rate": "0.001"}, stored)

    assert (after.batch_size, after.learning_rate) == (5000, 1e-3)
