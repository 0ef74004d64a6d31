"""When a round goes on without what is out."""

from __future__ import annotations

import pytest

from coordinator.domain.rounds import ClaimedWork, stops_waiting_at


def work(num_tokens, ended_at=None, *, is_back=True, is_probe=False):
    return ClaimedWork(
        num_tokens=num_tokens,
        ended_at=ended_at,
        is_back=is_back and ended_at is not None,
        is_probe=is_probe,
    )


def due(*claimed, quorum=0.7, round_s=40.0):
    return stops_waiting_at(claimed, quorum=quorum, round_s=round_s)


def test_the_grace_period_begins_with_the_claim_that_makes_the_quorum():
    assert due(work(30, 5.0), work(40, 7.0), work(30)) == 7.0 + 10.0


def test_what_comes_back_later_moves_nothing():
    assert due(work(30, 5.0), work(40, 7.0), work(30, 12.0)) == 17.0


def test_the_order_of_claims_does_not_matter():
    assert due(work(30), work(40, 7.0), work(30, 5.0)) == 17.0


def test_below_the_quorum_a_round_waits():
    assert due(work(30, 5.0), work(39, 7.0), work(31)) is None


def test_work_that_was_given_up_is_not_back():
    assert due(work(50, 5.0), work(50, 7.0, is_back=False)) is None


def test_a_quorum_of_one_waits_for_all():
    assert due(work(50, 5.0), work(50, 7.0), quorum=1.0) is None


def test_a_probe_is_waited_for():
    assert due(work(90, 5.0), work(10, is_probe=True)) is None


@pytest.mark.parametrize(("ended_at", "expected"), [(6.0, 15.0), (30.0, 30.0)])
def test_a_probe_that_ended_no_longer_holds_anything_up(ended_at, expected):
    assert due(work(90, 5.0), work(10, ended_at, is_probe=True)) == expected


def test_nothing_claimed_is_never_late():
    assert due() is None
