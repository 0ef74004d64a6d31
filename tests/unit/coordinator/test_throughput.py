"""How fast a worker is: recent tasks decide, an outlier does not, crumbs hardly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain import throughput
from coordinator.domain.leases import HARD_FACTOR
from coordinator.domain.sizing import task_tokens
from coordinator.domain.throughput import Trained, duration_ratio, head_room, measured


def task(speed, tokens=1000, predicted_s=None, num_tokens=None):
    return Trained(
        tokens=tokens,
        seconds=tokens / speed,
        num_tokens=num_tokens or tokens,
        predicted_s=predicted_s,
    )


def tasks(*speeds):
    """Return tasks of one size, newest first."""
    return [task(speed) for speed in speeds]


tasks_of_all_kinds = st.lists(
    st.builds(task, st.floats(0.01, 1e6), st.integers(1, 10**7)), min_size=1
)


def test_nothing_is_known_before_the_first_task():
    assert measured([]) is None


def test_the_first_task_is_the_measurement_and_says_little_of_the_spread():
    found = measured(tasks(100.0))

    assert found.tokens_per_s == 100.0
    assert found.spread == pytest.approx(0.7)


def test_one_outlier_changes_nothing_and_two_in_a_row_do():
    steady = tasks(*[100.0] * 6)

    assert measured([*tasks(10.0), *steady]).tokens_per_s == 100.0
    assert measured([*tasks(1000.0), *steady]).tokens_per_s == 100.0
    assert measured([*tasks(10.0, 10.0), *steady]).tokens_per_s == 10.0


def test_a_crumb_weighs_little():
    crumbs = [task(3.0, tokens=8), task(3.0, tokens=8)]

    assert measured([*crumbs, task(100.0)]).tokens_per_s == pytest.approx(100.0)


SEQ_LEN = 128


def sizes(recent, speed, *, overhead_s=0.0, num_tasks=4):
    """Return the sizes of the next tasks of 60 s for a worker that does `speed`."""
    found = []
    for _ in range(num_tasks):
        size = task_tokens(
            measured(recent).tokens_per_s,
            seconds=60.0,
            batch_tokens=8 * SEQ_LEN,
            seq_len=SEQ_LEN,
            largest=max(one.tokens for one in recent),
        )
        took_s = size / speed + overhead_s
        recent = [Trained(tokens=size, seconds=took_s, num_tokens=size), *recent]
        found.append(size)
    return found


@pytest.mark.parametrize(
    "slow",
    [
        [task(1.14, tokens=4096)],
        [task(15.0, tokens=60000)] * 2 + [task(1000.0, tokens=60000)] * 6,
    ],
)
def test_two_fast_crumbs_outvote_what_was_slow_however_large(slow):
    first, second, *rest = sizes(slow, 1000.0)

    assert first == second < 1000
    assert rest == [60032, 60032]


def test_crumbs_that_are_mostly_overhead_find_the_way_up_step_by_step():
    found = sizes([task(1.14, tokens=4096)], 1000.0, overhead_s=1.0)

    assert found[:2] == [128, 128]
    assert found[2] > 6000
    assert found[3] > 50000


def test_one_fast_crumb_changes_nothing():
    before = [task(15.0, tokens=60000)] * 3

    assert measured([task(1000.0, tokens=8), *before]).tokens_per_s == 15.0
    fast_and_slow = [task(1000.0, tokens=8), task(15.0, tokens=8), *before]
    assert measured(fast_and_slow).tokens_per_s == 15.0


def test_crumbs_that_are_a_little_faster_count_no_more_than_others():
    before = [task(100.0, tokens=60000)] * 3

    assert measured([task(190.0, tokens=8)] * 2 + before).tokens_per_s == 100.0


def test_what_is_long_ago_does_not_count():
    assert measured(tasks(*[100.0] * 8, *[1.0] * 50)) == measured(tasks(*[100.0] * 8))


def test_a_task_without_seconds_is_no_division_by_zero():
    nothing = Trained(tokens=8, seconds=0.0, num_tokens=8)

    assert measured([nothing]).tokens_per_s == 8000.0


@given(tasks_of_all_kinds)
def test_the_estimate_is_one_of_the_speeds(recent):
    found = measured(recent)

    speeds = [one.tokens / max(one.seconds, 1e-3) for one in recent[:8]]
    assert found.tokens_per_s in speeds
    assert found.spread >= 0.0


def test_steady_tasks_narrow_the_spread_and_with_it_the_head_room():
    rooms = [head_room(measured(tasks(*[100.0] * n)).spread) for n in range(1, 9)]

    assert rooms[0] == HARD_FACTOR
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[-1] == throughput.MIN_HEAD_ROOM


def test_restless_tasks_keep_the_head_room_wide():
    assert head_room(measured(tasks(*[40.0, 160.0] * 4)).spread) == HARD_FACTOR


def test_nobody_known_has_all_the_head_room():
    assert head_room(None) == HARD_FACTOR


def test_durations_are_compared_once_there_are_three():
    recent = [task(10.0, predicted_s=50.0), task(10.0, predicted_s=25.0)]

    assert duration_ratio(recent) is None
    assert duration_ratio([*recent, task(10.0)]) is None
    assert duration_ratio([*recent, task(10.0, predicted_s=200.0)]) == 2.0


def test_a_task_that_was_not_finished_counts_by_its_pace():
    cut_off = task(10.0, tokens=100, num_tokens=1000, predicted_s=20.0)

    assert duration_ratio([cut_off] * 3) == 5.0


def test_only_the_last_five_are_compared():
    newest = [task(10.0, predicted_s=100.0)] * 5

    assert duration_ratio([*newest, *[task(1.0, predicted_s=1.0)] * 9]) == 1.0


@pytest.mark.parametrize(
    ("ratio", "due"),
    [(None, False), (0.33, False), (3.0, False), (0.32, True), (3.1, True)],
)
def test_predictions_beyond_the_limits_are_alarming(ratio, due):
    assert throughput.is_alarming(ratio) is due


def test_an_alarm_has_the_figures():
    recent = [task(10.0, predicted_s=25.0), task(10.0, predicted_s=20.0)]

    said = throughput.ratio_alarm(4.5, recent)

    assert "take 4.5 times as long as predicted (limits 0.33 and 3)" in said
    assert said.endswith("100 s, predicted 25 s; 100 s, predicted 20 s.")
