"""When the run ends: a moment with its window, or the reason why nobody knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.eta import estimate

NOW = 1000.0


def test_without_a_measured_round_nobody_knows():
    eta = estimate(now=NOW, tokens_left=100, stop_at=None, rates=[])

    assert eta.at is None
    assert eta.reason == "Needs one measured round."


def test_without_budget_and_time_it_never_ends():
    eta = estimate(now=NOW, tokens_left=None, stop_at=None, rates=[10.0])

    assert eta.at is None
    assert eta.reason == "No token budget is set."


def test_a_set_time_is_certain():
    eta = estimate(now=NOW, tokens_left=None, stop_at=1500.0, rates=[10.0])

    assert (eta.earliest_at, eta.at, eta.latest_at) == (1500.0, 1500.0, 1500.0)


def test_the_middle_rate_decides_and_the_others_are_the_window():
    eta = estimate(
        now=NOW, tokens_left=1000, stop_at=None, rates=[10.0, 0.0, 5.0, 20.0]
    )

    assert eta.at == NOW + 100.0
    assert eta.earliest_at == NOW + 50.0
    assert eta.latest_at == NOW + 200.0
    assert "1000 tokens left at 10 tokens/s" in eta.reason


@pytest.mark.parametrize(("stop_at", "due"), [(1050.0, 1050.0), (1200.0, 1100.0)])
def test_time_or_tokens_whichever_comes_first(stop_at, due):
    eta = estimate(now=NOW, tokens_left=1000, stop_at=stop_at, rates=[10.0])

    assert eta.at == due


def test_one_outlier_among_many_rounds_does_not_widen_the_window():
    rates = [10.0] * 19 + [1000.0]

    eta = estimate(now=NOW, tokens_left=1000, stop_at=None, rates=rates)

    assert eta.earliest_at == eta.at == eta.latest_at


@given(
    tokens_left=st.integers(0, 10**9),
    stop_at=st.none() | st.floats(NOW, 1e6),
    rates=st.lists(st.floats(0.0, 1e6), max_size=30),
)
def test_the_window_holds_the_moment(tokens_left, stop_at, rates):
    eta = estimate(now=NOW, tokens_left=tokens_left, stop_at=stop_at, rates=rates)

    if eta.at is not None:
        assert NOW <= eta.earliest_at <= eta.at <= eta.latest_at
    assert eta.reason
