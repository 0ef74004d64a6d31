"""When the run ends: a moment with its window, or the reason why nobody knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.eta import MANY_ARRIVALS, NUM_ROUNDS, Closed, estimate, windows

NOW = 1000.0


def rounds(*rates, seconds=10.0):
    """Return rounds of 10 s with these rates, the last of them closed just now."""
    return [
        Closed(
            at=NOW - seconds * (len(rates) - place - 1),
            tokens=round(rate * seconds),
            seconds=seconds,
        )
        for place, rate in enumerate(rates)
    ]


def guess(*rates, now=NOW, tokens_left=1000, stop_at=None, round_s=10.0):
    return estimate(
        now=now,
        tokens_left=tokens_left,
        stop_at=stop_at,
        rounds=rounds(*rates),
        round_s=round_s,
    )


STEADY = [10.0] * 5


@pytest.mark.parametrize("count", [0, 1, 4])
def test_without_enough_rounds_nobody_knows(count):
    eta = guess(*STEADY[:count])

    assert (eta.at, eta.earliest_at, eta.latest_at) == (None, None, None)
    assert eta.reason == f"Needs 5 closed rounds, there are {count}."


def test_without_budget_and_time_it_never_ends():
    eta = guess(*STEADY, tokens_left=None)

    assert eta.at is None
    assert eta.reason == "No token budget is set."


@pytest.mark.parametrize(("tokens_left", "rates"), [(None, STEADY), (1000, [])])
def test_a_set_time_is_certain(tokens_left, rates):
    eta = guess(*rates, tokens_left=tokens_left, stop_at=1500.0)

    assert (eta.earliest_at, eta.at, eta.latest_at) == (1500.0, 1500.0, 1500.0)
    assert eta.reason.startswith("Stops at a set time.")


def test_the_middle_rate_decides_and_the_others_are_the_window():
    eta = guess(10.0, 5.0, 20.0, 10.0, 10.0)

    assert eta.at == NOW + 100.0
    assert eta.earliest_at == NOW + 50.0
    assert eta.latest_at == NOW + 200.0
    assert eta.reason == (
        "1000 tokens left at 10 tokens/s, by the last 5 rounds (5 to 20)."
    )


@pytest.mark.parametrize(("stop_at", "due"), [(1050.0, 1050.0), (1200.0, 1100.0)])
def test_time_or_tokens_whichever_comes_first(stop_at, due):
    assert guess(*STEADY, stop_at=stop_at).at == due


def test_one_outlier_among_many_rounds_does_not_widen_the_window():
    eta = guess(*[10.0] * 19, 1000.0)

    assert eta.earliest_at == eta.at == eta.latest_at


def test_only_the_last_rounds_count():
    assert guess(*[1.0] * 100, *[10.0] * 20) == guess(*[10.0] * 20)


def test_after_a_change_only_the_rounds_since_then_count():
    eta = guess(*[10.0] * 5, *[40.0] * 5)

    assert eta.at == NOW + 25.0
    assert "by the last 5 rounds" in eta.reason


def test_a_change_that_is_too_young_gives_no_guess():
    eta = guess(*[10.0] * 4, *[40.0] * 4)

    assert eta.at is None
    assert eta.reason == (
        "The fleet has changed: 10 tokens/s some rounds ago, 40 in the last 4."
    )


def test_rounds_that_are_too_far_apart_give_no_guess():
    eta = guess(10.0, 45.0, 20.0, 10.0, 20.0, 45.0)

    assert eta.at is None
    assert eta.reason == "The last 6 rounds are too far apart: 10 to 45 tokens/s."


@pytest.mark.parametrize(("silence_s", "known"), [(60.0, True), (61.0, False)])
def test_a_fleet_that_stands_still_gives_no_guess(silence_s, known):
    eta = guess(*STEADY, now=NOW + silence_s)

    assert (eta.at is not None) is known
    if not known:
        assert eta.reason == "No round was closed for 61 s, and one takes 10 s."


@pytest.mark.parametrize(("silence_s", "known"), [(400.0, True), (401.0, False)])
def test_a_round_may_be_longer_than_those_before_it(silence_s, known):
    eta = guess(*STEADY, now=NOW + silence_s, round_s=80.0)

    assert (eta.at is not None) is known


@given(
    tokens_left=st.integers(0, 10**9),
    stop_at=st.none() | st.floats(NOW, 1e6),
    rates=st.lists(st.integers(1, 10**6), max_size=30),
)
def test_the_window_holds_the_moment(tokens_left, stop_at, rates):
    eta = guess(*rates, tokens_left=tokens_left, stop_at=stop_at)

    if eta.at is not None:
        assert NOW <= eta.earliest_at <= eta.at <= eta.latest_at
    assert eta.reason


def test_arrivals_are_grouped_by_time():
    arrivals = [(0.0, 9), (4.0, 1), (10.0, 2), (11.0, 3), (25.0, 4), (26.0, 5)]

    found = [(one.at, one.tokens, one.seconds) for one in windows(arrivals, 10.0)]

    assert found == [(10.0, 3, 10.0), (25.0, 7, 15.0)]
    assert windows([], 10.0) == []
    # Versions without a token end none.
    (only,) = windows([(0.0, 7), (11.0, 0), (22.0, 0), (33.0, 5)], 10.0)
    assert (only.tokens, only.seconds) == (5, 33.0)


def test_many_arrivals_in_little_time_make_shorter_windows():
    found = windows([(0.1 * n, 7) for n in range(MANY_ARRIVALS)], 60.0)

    assert len(found) == pytest.approx(NUM_ROUNDS, abs=1)
    assert {round(one.rate) for one in found} == {70}
