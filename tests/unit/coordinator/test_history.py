"""A long run costs who looks at it no more: few points for charts, as fast a look."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, insert, select

from coordinator.domain.history import MOST_OLDER, NUM_NEWEST, stride, thinned
from coordinator.service.looking import look
from coordinator.service.view import FleetView
from coordinator.store import tables
from tests.unit.coordinator.fleets import World


@pytest.mark.parametrize(
    ("num_points", "due"),
    [
        (0, 1),
        (1, 1),
        (NUM_NEWEST + MOST_OLDER, 1),
        (NUM_NEWEST + MOST_OLDER + 1, 2),
        (NUM_NEWEST + 2 * MOST_OLDER, 2),
        (NUM_NEWEST + 2 * MOST_OLDER + 1, 4),
        (60_000, 32),
    ],
)
def test_a_longer_run_shows_one_of_more_points(num_points, due):
    assert stride(num_points) == due


@given(st.integers(1, 30_000), st.integers(0, 2**32))
def test_of_any_number_the_newest_the_kept_and_a_few_are_shown(num_points, place):
    points = [float(i) for i in range(num_points)]
    keep = points[place % num_points]

    shown = thinned(points, keep=keep)

    assert shown == sorted(set(shown))
    assert shown[-NUM_NEWEST:] == points[-NUM_NEWEST:]
    assert keep in shown
    assert len(shown) <= NUM_NEWEST + MOST_OLDER + 2
    assert {points[0], points[-1]} <= set(shown)


def test_what_is_shown_of_a_longer_run_was_shown_before():
    old = [set(thinned(range(n), keep=None)) for n in (2000, 5000, 9000, 40_000)]

    for before, after in pairwise(old):
        assert {point for point in after if point < max(before)} <= before


def looked(connection: Connection, world: World, *, history: bool) -> FleetView:
    return look(
        connection,
        world.fleet,
        now=world.clock.now(),
        loop_lag_ms=0.0,
        insecure_http=False,
        history=history,
    )


def grow(world: World, num: int, *, back: int) -> None:
    """Add so many versions to a run; `back` is an earlier one again."""
    root = dict(world.read(lambda c: c.execute(select(tables.versions)).one()._mapping))
    rows = [
        root
        | {
            "version": number,
            "parent": number - 1,
            "tokens_total": 10 * number,
            "train_loss": 3.0,
            "rolled_back_to": 5 if number == back else None,
        }
        for number in range(2, num + 1)
    ]
    world.write(lambda c: c.execute(insert(tables.versions), rows))


def test_a_page_that_opens_late_gets_the_points_of_its_charts(world: World):
    world.start_run()
    grow(world, 6000, back=1235)

    view = world.read(lambda c: looked(c, world, history=True))
    shown = [point.version for point in view.versions]

    assert shown == sorted(set(shown))
    assert len(shown) < NUM_NEWEST + MOST_OLDER
    # The root, where it went back with the version before, one of four, and the end.
    assert shown[:3] == [1, 4, 8]
    assert {1232, 1234, 1235, 1236} <= set(shown)
    assert not {1231, 1233, 1237} & set(shown)
    assert shown[-NUM_NEWEST:] == list(range(5501, 6001))


def steps_of(world: World, act: Callable[[Connection], object]) -> int:
    """Return how much SQLite does for it, in thousands of its instructions."""
    counted = []

    def watched(connection):
        raw = connection.connection.dbapi_connection
        raw.set_progress_handler(lambda: counted.append(1) or 0, 1000)
        act(connection)
        raw.set_progress_handler(None, 0)

    world.read(watched)
    return len(counted)


def test_a_look_takes_no_longer_the_more_was_trained(running: World):
    def a_look(connection):
        looked(connection, running, history=False)

    def all_rows(connection):
        connection.execute(select(tables.tasks)).all()

    running.submit(running.claimed())
    running.close_round()
    before = steps_of(running, a_look)

    def train_for_days(connection):
        (task,) = connection.execute(select(tables.tasks)).mappings()
        (sent,) = connection.execute(select(tables.submissions)).mappings()
        for number in range(5000):
            names = {"task_id": f"t{number}", "submission_id": f"s{number}"}
            of_task = dict(task) | {"task_id": names["task_id"]}
            connection.execute(insert(tables.tasks).values(of_task))
            # Of an earlier version: the last round is looked at as a whole.
            old = dict(sent) | names | {"version": 1}
            connection.execute(insert(tables.submissions).values(old))

    running.write(train_for_days)

    assert steps_of(running, a_look) <= before + 1
    assert steps_of(running, all_rows) > 100  # what is looked through is counted
