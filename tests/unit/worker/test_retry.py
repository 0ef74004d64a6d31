"""Patience: how long between two tries, and what ends them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import ProtocolError, RetryLaterError, StoppedError
from worker.retry import BASE_S, CAP_S, Retry


class Answers:
    """A request with prepared outcomes."""

    def __init__(self, *outcomes: object) -> None:
        self.left = list(outcomes)

    def __call__(self) -> object:
        outcome = self.left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class LargestJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def quiet() -> None:
    """Go on."""


def later(**fields) -> RetryLaterError:
    return RetryLaterError("busy", **fields)


def waits_of(*outcomes: object) -> list[float]:
    """Return the whole wait after each try but the last."""
    waits: list[float] = []
    retry = Retry(
        LargestJitter(), lambda seconds: waits.__setitem__(-1, waits[-1] + seconds)
    )
    request = Answers(*outcomes)

    def ask() -> object:
        waits.append(0.0)
        return request()

    retry.until_answered(ask, quiet)
    return waits[:-1]


def test_it_returns_the_answer_after_as_many_tries_as_it_takes() -> None:
    request = Answers(*[later()] * 50, "yes")

    assert (
        Retry(random.Random(0), lambda _: None).until_answered(request, quiet) == "yes"
    )
    assert not request.left


def test_waits_double_up_to_a_cap() -> None:
    waits = waits_of(*[later()] * 9, "yes")

    assert waits == pytest.approx([min(CAP_S, BASE_S * 2**n) for n in range(9)])


def test_the_wait_asked_for_comes_on_top() -> None:
    assert waits_of(later(retry_after_s=7.0), "yes") == pytest.approx([7.0 + BASE_S])


def test_progress_starts_patience_anew() -> None:
    waits = waits_of(later(), later(), later(progressed=True), later(), "yes")

    assert waits == pytest.approx([BASE_S * n for n in (1, 2, 1, 2)])


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_jitter_is_anywhere_between_nothing_and_the_limit(attempt, seed) -> None:
    delay_s = Retry(random.Random(seed)).delay_s(attempt)

    assert 0.0 <= delay_s <= min(CAP_S, BASE_S * 2.0 ** min(attempt, 60))


def test_another_error_ends_it_at_once() -> None:
    request = Answers(ProtocolError("nonsense"), "yes")

    with pytest.raises(ProtocolError):
        Retry(random.Random(0), lambda _: None).until_answered(request, quiet)

    assert request.left == ["yes"]


def test_a_check_that_raises_ends_a_wait_within_one_slice() -> None:
    slept: list[float] = []

    def stop_after_three() -> None:
        if len(slept) == 3:
            raise StoppedError("told to stop")

    with pytest.raises(StoppedError):
        Retry(random.Random(0), slept.append).pause(60.0, stop_after_three)

    assert sum(slept) < 1.0


def test_a_check_that_raises_prevents_the_first_try() -> None:
    request = Answers("yes")

    def stop() -> None:
        raise StoppedError("told to stop")

    with pytest.raises(StoppedError):
        Retry(random.Random(0)).until_answered(request, stop)

    assert request.left == ["yes"]
