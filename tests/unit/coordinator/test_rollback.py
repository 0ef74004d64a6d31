"""When a run goes back, to which version, and how often."""

from __future__ import annotations

import pytest

from coordinator.domain.rollback import (
    Rollback,
    deciding_losses,
    loss_alarm,
    newest_line,
    num_in_vain,
    num_steps,
    rollback_due,
)

RISEN = {40: 5.0, 50: 5.3, 60: 5.4, 70: 5.5}


def test_without_a_rollback_the_line_is_every_score_by_version():
    assert list(newest_line({3: 2.0, 1: 3.0}, [])) == [1, 3]


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        # It has the loss of what it is, until it has one of its own.
        ({}, {72: 5.0}),
        ({72: 5.01, 80: 4.9}, {72: 5.01, 80: 4.9}),
    ],
)
def test_a_rollback_begins_a_new_line(scores, line):
    assert newest_line(RISEN | scores, [Rollback(72, 40)]) == line


def test_a_rollback_to_a_version_without_a_score_begins_an_empty_line():
    assert newest_line(RISEN, [Rollback(72, 41)]) == {}


def test_a_run_goes_back_to_the_best_of_its_line_once_loss_has_risen():
    assert rollback_due(RISEN, []) == 40
    assert rollback_due({40: 5.0, 50: 5.3, 60: 5.4, 70: 5.1}, []) is None
    assert rollback_due({}, []) is None
    # Going back by hand was somebody's decision: what was better before is let alone.
    by_hand = [Rollback(72, 30)]
    line = newest_line(RISEN | {72: 5.2, 80: 5.4, 90: 5.5, 100: 5.6}, by_hand)
    assert rollback_due(line, by_hand) == 72


@pytest.mark.parametrize(
    ("whole", "to"),
    [
        ({20, 30, 50, 60, 70}, 30),
        # The newest ones are judged, whether or not they are kept.
        ({20, 30, 40}, 40),
        # Nothing is 3 % better than the last three.
        ({20, 50, 60, 70}, None),
    ],
)
def test_nobody_goes_back_to_a_version_that_is_lost(whole, to):
    line = {20: 5.25, 30: 5.1} | RISEN

    assert rollback_due(deciding_losses(line, whole), []) == to


def test_nobody_goes_back_a_third_time_without_anything_better_in_between():
    rollbacks = [Rollback(72, 40)]
    again = {72: 5.0, 80: 5.3, 90: 5.4, 100: 5.5}
    assert rollback_due(newest_line(RISEN | again, rollbacks), rollbacks) == 72

    rollbacks.append(Rollback(102, 72))
    third = RISEN | again | {102: 5.0, 110: 5.3, 120: 5.4, 130: 5.5}
    assert rollback_due(newest_line(third, rollbacks), rollbacks) is None

    better = third | {105: 4.9}
    assert rollback_due(newest_line(better, rollbacks), rollbacks) == 105


@pytest.mark.parametrize(
    ("rollbacks", "count"),
    [
        ([], 0),
        ([Rollback(72, 40)], 1),
        ([Rollback(50, 40), Rollback(72, 50)], 2),
        ([Rollback(50, 40), Rollback(72, 60)], 1),
    ],
)
def test_rollbacks_are_in_vain_while_they_lead_to_one_another(rollbacks, count):
    assert num_in_vain(72, rollbacks) == count


def test_the_alarm_says_how_often_the_run_has_gone_back():
    start = "The last 3 evaluations are 6.0 % or more above version {}, the best."
    assert loss_alarm(RISEN | {70: 5.3}, []) == start.format(40)
    once = {72: 5.0, 80: 5.3, 90: 5.4, 100: 5.5}
    assert loss_alarm(once, [Rollback(72, 40)]) == (
        f"{start.format(72)} The run has gone back there once already, and nothing was "
        "better."
    )
    assert loss_alarm({40: 5.0, 50: 5.3}, []) is None


def test_a_version_again_has_as_many_steps_as_what_it_is():
    rollbacks = [Rollback(20, 12), Rollback(30, 22)]

    steps = [num_steps(version, 10, rollbacks) for version in (10, 19, 20, 22, 30, 31)]

    assert steps == [0, 9, 2, 4, 4, 5]


def test_steps_are_counted_since_those_of_the_other_kind():
    rollbacks = [Rollback(20, 12), Rollback(30, 16), Rollback(40, 31)]
    others = [11, 15, 24, 32, 33]
    due = {
        10: 0,  # the root
        11: 0,
        12: 1,
        14: 3,
        15: 0,
        16: 1,
        20: 1,  # as 12
        23: 4,
        24: 0,
        29: 5,
        30: 1,  # as 16
        31: 2,
        33: 0,
        39: 6,
        40: 2,  # as 31, though 33 came between
        41: 3,
    }

    assert {n: num_steps(n, 10, rollbacks, others) for n in due} == due
