"""How long the next round should take, by what the last ones took."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.plan import AUTO, TrainingPlan
from coordinator.domain.round_time import (
    AIM,
    KEEP,
    MIN_ROUNDS,
    NUM_ROUNDS,
    Measured,
    Work,
    first_round_s,
    measured,
    next_round_s,
    reason,
    usual,
)

#: A local step has 8 sequences of 128 tokens.
PLAN = TrainingPlan(batch_size=8, evaluate_every=10)
SEQ_LEN = 128
STEP = 1024
WIDE = msgspec.structs.replace(PLAN, round_min_s=0.1, round_max_s=1e6)
FIXED = msgspec.structs.replace(PLAN, round_s=30.0)
GRADIENT = msgspec.structs.replace(PLAN, round_kind=RoundKind.GRADIENT)

seconds = st.floats(0.0, 1e5)
bounds = st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)).map(sorted)


def took(*overheads, shortest_s=0.0):
    """Return closed rounds with these overheads, oldest first."""
    return [Measured(overhead_s=one, shortest_s=shortest_s) for one in overheads]


def after(overhead_s, *, before_s=60.0, plan=PLAN, shortest_s=0.0):
    """Return the round time after rounds that were all alike."""
    rounds = took(*[overhead_s] * NUM_ROUNDS, shortest_s=shortest_s)
    return next_round_s(plan, before_s, rounds)


def settled(overhead_s, *, plan=PLAN, shortest_s=0.0):
    """Return the round time that such rounds come to, and the ways there."""
    found = [first_round_s(plan)]
    for _ in range(40):
        found.append(
            after(overhead_s, before_s=found[-1], plan=plan, shortest_s=shortest_s)
        )
    return found


# -- what a round took --------------------------------------------------------------


def work(*, overhead_s=1.0, tokens=10 * STEP, step_s=0.5, fixed_size=False):
    compute_s = tokens / STEP * step_s
    return Work(
        tokens=tokens,
        elapsed_s=overhead_s + compute_s,
        compute_s=compute_s,
        fixed_size=fixed_size,
    )


def measure(*works, merge_s=0.0, evaluation_s=0.0, plan=PLAN):
    return measured(
        works, merge_s=merge_s, evaluation_s=evaluation_s, plan=plan, seq_len=SEQ_LEN
    )


def test_the_overhead_is_what_the_middle_worker_did_not_train_and_the_merge():
    works = [work(overhead_s=1.0), work(overhead_s=2.0), work(overhead_s=90.0)]

    assert measure(*works, merge_s=0.5).overhead_s == pytest.approx(2.5)


def test_an_evaluation_is_shared_by_the_rounds_and_workers_between_two():
    found = measure(work(), work(), evaluation_s=40.0)

    assert found.overhead_s == pytest.approx(1.0 + 40.0 / 10 / 2)


def test_nobody_trains_for_longer_than_the_coordinator_has_seen():
    boast = Work(tokens=STEP, elapsed_s=5.0, compute_s=1e6, fixed_size=False)

    assert measure(boast).overhead_s == 0.0
    assert measure(boast).shortest_s == 16 * 5.0


def test_the_slowest_worker_must_manage_a_local_step():
    slow = work(overhead_s=3.0, tokens=SEQ_LEN, step_s=200.0)

    found = measure(work(), work(), slow)

    assert found.shortest_s == pytest.approx(203.0)


def test_the_middle_worker_must_manage_sixteen_local_steps():
    assert measure(work(step_s=2.0)).shortest_s == pytest.approx(33.0)


def test_in_a_gradient_round_one_sequence_is_enough():
    slow = work(overhead_s=3.0, step_s=200.0)

    found = measure(work(step_s=2.0), slow, plan=GRADIENT)

    assert found.shortest_s == pytest.approx(3.0 + 200.0 / 8)


def test_a_task_of_a_fixed_size_can_not_be_shorter_than_it_is():
    task = work(overhead_s=1.0, step_s=12.5, tokens=4 * STEP, fixed_size=True)

    assert measure(task).shortest_s == pytest.approx(51.0)


def test_a_round_without_fresh_submissions_says_nothing():
    assert measure() is None


def test_a_single_odd_round_changes_nothing():
    found = usual(took(500.0, 1.0, 1.2, 300.0, 1.1))

    assert found.overhead_s == 1.2
    assert usual(took(*[9.0] * 20, *[1.0] * NUM_ROUNDS)).overhead_s == 1.0
    assert usual([]) is None


# -- the choice -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "due"),
    [
        (PLAN, 60.0),
        (msgspec.structs.replace(PLAN, round_max_s=20.0), 20.0),
        (msgspec.structs.replace(PLAN, round_min_s=90.0), 90.0),
        (FIXED, 30.0),
    ],
)
def test_a_run_begins_with_a_minute_within_its_bounds(plan, due):
    assert first_round_s(plan) == due


@pytest.mark.parametrize("count", range(MIN_ROUNDS))
def test_it_stays_until_enough_rounds_are_measured(count):
    assert next_round_s(PLAN, 60.0, took(*[9.0] * count)) == 60.0


@pytest.mark.parametrize(
    ("overhead_s", "due"),
    [
        (0.0, 30.0),  # half of what it was, at most
        (1.0, 30.0),
        (1.4, 40.0),
        (1.79, 50.0),
        (1.81, 60.0),  # 3 %: stays
        (2.99, 60.0),  # 5 %: stays
        (3.01, 80.0),
        (4.0, 100.0),
        (4.7, 120.0),
        (99.0, 120.0),  # twice, at most
    ],
)
def test_an_overhead_of_about_four_percent_is_aimed_at(overhead_s, due):
    assert after(overhead_s) == due


def test_what_a_task_needs_counts_where_it_is_more():
    assert after(1.0, shortest_s=70.0) == 60.0
    assert after(1.0, shortest_s=76.0) == 80.0
    assert after(1.0, shortest_s=33.0) == 40.0


@pytest.mark.parametrize(
    ("overhead_s", "due"), [(0.01, 10.0), (1.2, 30.0), (3.1, 80.0), (50.0, 600.0)]
)
def test_steady_rounds_come_to_their_round_time_and_stay(overhead_s, due):
    way = settled(overhead_s)

    assert way[-30:] == [due] * 30


def test_a_fixed_round_time_is_that_whatever_is_measured():
    assert after(50.0, plan=FIXED) == 30.0
    assert after(50.0, plan=msgspec.structs.replace(FIXED, round_s=3.0)) == 3.0


def test_new_bounds_hold_at_once():
    assert after(99.0, before_s=5000.0) == 600.0
    assert next_round_s(PLAN, 2.0, []) == 10.0


@given(st.lists(seconds, max_size=8), seconds, st.floats(0.1, 1e5), bounds)
def test_it_is_within_bounds_and_at_most_doubles_or_halves(
    overheads, shortest_s, before_s, bounds
):
    low, high = bounds
    plan = msgspec.structs.replace(PLAN, round_min_s=low, round_max_s=high)

    found = next_round_s(plan, before_s, took(*overheads, shortest_s=shortest_s))

    assert low <= found <= high
    inside = min(max(before_s, low), high)
    assert inside / 2 <= found <= inside * 2


@given(seconds, seconds, st.floats(0.1, 1e5), seconds)
def test_more_overhead_never_makes_rounds_shorter(one, other, before_s, shortest_s):
    less, more = sorted((one, other))

    assert after(less, before_s=before_s, plan=WIDE, shortest_s=shortest_s) <= after(
        more, before_s=before_s, plan=WIDE, shortest_s=shortest_s
    )


@given(st.floats(0.05, 1e4), st.floats(0.0, 1e4))
def test_a_constant_overhead_comes_to_a_share_of_three_to_five_percent(
    overhead_s, shortest_s
):
    way = settled(overhead_s, plan=WIDE, shortest_s=shortest_s)

    assert len(set(way[-15:])) == 1
    wanted_s = max(overhead_s / AIM, shortest_s)
    assert KEEP[0] * way[-1] <= wanted_s <= KEEP[1] * way[-1]
    # And it goes there straight.
    turns = {later > earlier for earlier, later in pairwise(way) if later != earlier}
    assert len(turns) <= 1


@given(st.floats(0.1, 1e3), st.lists(st.floats(0.9, 1.1), min_size=60, max_size=60))
def test_a_jitter_of_ten_percent_does_not_make_it_flap(overhead_s, jitter):
    way, rounds = [first_round_s(WIDE)], []
    for factor in jitter:
        rounds += took(factor * overhead_s)
        way.append(next_round_s(WIDE, way[-1], rounds))

    moves = [later > earlier for earlier, later in pairwise(way) if later != earlier]
    assert sum(one != other for one, other in pairwise(moves)) <= 1


# -- what is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "rounds", "due"),
    [
        (
            PLAN,
            [],
            "Overhead not measured yet. Chosen between 10 and 600 s once 3 rounds are "
            "measured.",
        ),
        (
            PLAN,
            took(1.2, 1.2, 1.2),
            "Overhead 1.2 s of 40 s = 3 %. Chosen between 10 and 600 s.",
        ),
        (
            PLAN,
            took(1.2, 1.2, 1.2, shortest_s=33.0),
            "Overhead 1.2 s of 40 s = 3 %. Tasks need 33 s; chosen between 10 and "
            "600 s.",
        ),
        (
            msgspec.structs.replace(PLAN, round_s=40.0),
            took(0.6),
            "Overhead 0.6 s of 40 s = 1.5 %. Fixed.",
        ),
        (
            PLAN,
            took(113.0, 113.0, 113.0, shortest_s=4000.0),
            "Overhead 110 s of 40 s = 280 %. Tasks need 4000 s; chosen between 10 and "
            "600 s.",
        ),
    ],
)
def test_the_reason_has_the_numbers(plan, rounds, due):
    assert reason(plan, 40.0, rounds) == due


def test_a_plan_stored_with_a_fixed_round_time_keeps_it():
    stored = msgspec.json.decode(b'{"round_s": 60.0}', type=TrainingPlan)

    assert (stored.round_s, stored.round_max_s) == (60.0, 600.0)
    assert TrainingPlan().round_s == AUTO
