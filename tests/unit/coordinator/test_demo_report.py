"""What the demo says while it trains, ends, goes on, and kills a worker."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from coordinator.demo.killing import Killing
from coordinator.demo.report import Screen, progress_line, running_minutes
from coordinator.service.looking import look
from coordinator.service.view import FleetView, VersionPoint
from tests.unit.coordinator.fleets import World


class FakeChild:
    """A worker process; `meanwhile` happens just before it dies."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile = meanwhile
        self.num_kills = 0

    def kill(self) -> None:
        self._meanwhile()
        self.num_kills += 1


def looked(world: World) -> FleetView:
    now = world.clock.now()
    return world.read(
        lambda c: look(
            c, world.fleet, now=now, loop_lag_ms=0, insecure_http=False, history=True
        )
    )


def killing(world: World, child: FakeChild) -> Killing:
    data = world.fleet.corpus.with_name("data")
    return Killing(data, {"w1": child}, after_s=0.0)  # type: ignore[dict-item]


def in_mid_task(world: World):
    task = world.claimed()
    world.heartbeat(task, tokens_done=task.byte_length // 8)
    return task, looked(world)


def test_the_line_tells_how_far_training_is(running: World):
    line = progress_line(looked(running), 18.0, 180.0, is_ending=False)

    assert "10 %" in line
    assert "ETA 2:42" in line


@pytest.mark.parametrize(("told", "elapsed_s"), [(True, 18.0), (False, 180.0)])
def test_a_training_that_ends_says_so_instead_of_a_time(running, told, elapsed_s):
    out = io.StringIO()
    screen = Screen(180.0, out)
    screen.is_ending = told

    screen.draw(looked(running), elapsed_s)

    assert "ending" in out.getvalue()
    assert "the last round closes and is scored" in out.getvalue()
    assert "ETA" not in out.getvalue()
    assert "%" not in out.getvalue()


def test_the_time_between_two_runs_is_not_counted():
    def point(version: int, at: float, tokens: int, rate: float | None):
        return VersionPoint(
            version=version,
            at=at,
            tokens_total=tokens,
            num_submissions=1,
            train_loss=None,
            tokens_per_s=rate,
        )

    found = running_minutes(
        [
            point(1, 0.0, 0, None),
            point(2, 70.0, 600, 10.0),
            point(3, 90_000.0, 1800, 10.0),
        ]
    )

    assert found == {1: 0.0, 2: 1.0, 3: 3.0}


def test_a_worker_dies_in_mid_task_and_its_stretch_is_known(running, capsys):
    task, view = in_mid_task(running)
    child = FakeChild(lambda: None)
    story = killing(running, child)

    story.step(view, 1.0)

    assert (child.num_kills, story.killed) == (1, {"w1"})
    assert story.victim.num_tokens == task.byte_length // 4
    assert task.task_id in capsys.readouterr().out


def test_a_worker_whose_task_is_back_already_lives_on(running):
    task, view = in_mid_task(running)
    running.submit(task)
    child = FakeChild(lambda: None)
    story = killing(running, child)

    story.step(view, 1.0)

    assert (child.num_kills, story.killed, story.victim) == (0, set(), None)


def test_a_task_handed_in_at_the_last_moment_leaves_nothing_to_train(running, capsys):
    task, view = in_mid_task(running)
    child = FakeChild(lambda: running.submit(task))
    story = killing(running, child)

    story.step(view, 1.0)
    story.step(view, 2.0)

    assert (child.num_kills, story.killed, story.victim) == (1, {"w1"}, None)
    assert "nothing of it has to be trained again" in capsys.readouterr().out
