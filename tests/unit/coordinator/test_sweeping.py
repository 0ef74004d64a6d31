"""What happens by itself: the end of a run, a corpus that appears, the clock."""

from __future__ import annotations

import asyncio

import pytest

from bitnet_ext.wire.verdicts import LeaseState, TaskKind
from coordinator.service.seeding import is_over
from coordinator.service.starting import RunSettings
from coordinator.service.sweeping import (
    every,
    keep_clock,
    sweep,
)
from coordinator.store import clock, runs, tasks
from coordinator.store.system import LeaseClock
from tests.unit.coordinator.fleets import PLAN, World

SETTINGS = RunSettings(preset="tiny", seed=3, plan=PLAN)


def do_sweep(world):
    world.do(sweep(world.fleet, SETTINGS))


def end_by_time(world):
    world.change_run(stop_at=world.clock.now())


def test_a_run_goes_on_until_its_time_or_its_budget(running: World):
    run, now = running.run_row(), running.clock.now()
    assert not is_over(run, now)
    running.change_run(stop_at=now + 1)
    assert not is_over(running.run_row(), now)
    assert is_over(running.run_row(), now + 1)
    running.change_run(stop_at=None, token_budget=64)
    assert not is_over(running.run_row(), now)
    running.train_round(0.5)
    assert is_over(running.run_row(), now)


def test_the_last_version_is_scored_and_then_the_run_is_finished(running: World):
    running.train_round(0.5)
    end_by_time(running)

    do_sweep(running)
    do_sweep(running)

    assert running.run_row().state == "running"
    assert (
        running.read(lambda c: tasks.count_unfinished(c, "r-1", TaskKind.EVALUATE)) == 1
    )
    task = running.claimed()
    assert (task.kind, task.base_version) == (TaskKind.EVALUATE, 2)
    do_sweep(running)
    assert running.run_row().state == "running"
    running.score(task)
    do_sweep(running)
    assert running.run_row().state == "finished"
    assert running.claim() is None


def test_a_run_whose_score_was_given_up_finishes_without_it(running: World):
    end_by_time(running)
    do_sweep(running)
    for _ in range(5):
        running.fail(running.claimed())
        running.clock.advance(60.0)

    do_sweep(running)

    assert running.run_row().state == "finished"


def test_work_that_is_out_may_come_back_first(running: World):
    task = running.claimed()
    end_by_time(running)

    do_sweep(running)
    assert running.read(lambda c: tasks.evaluation_of(c, "r-1", 1)) is None
    running.submit(task)
    do_sweep(running)
    assert running.read(lambda c: tasks.evaluation_of(c, "r-1", 1)) is None
    running.close_round()
    do_sweep(running)

    assert running.read(lambda c: tasks.evaluation_of(c, "r-1", 2)) is not None


def test_a_used_up_budget_ends_the_run_too(running: World):
    running.change_run(token_budget=64)
    running.train_round(0.5)
    do_sweep(running)
    running.score(running.claimed())

    do_sweep(running)

    assert running.run_row().state == "finished"


def test_a_sweep_ends_leases_that_ran_out(running: World):
    task = running.claimed()
    running.clock.advance(30.0)

    do_sweep(running)

    assert running.task(task.task_id).state == "pending"


@pytest.fixture
def asleep(running: World) -> World:
    """A task is out, and the coordinator was stopped for 40 s between two sweeps."""
    running.held = running.claimed()
    do_sweep(running)
    running.clock.advance(40.0)
    return running


def test_after_a_sleep_of_its_own_a_sweep_ends_no_lease(asleep: World):
    do_sweep(asleep)

    assert asleep.heartbeat(asleep.held).lease_s == 30.0
    assert asleep.submit(asleep.held).state == "accepted"


@pytest.mark.parametrize("asks", ["heartbeat", "release", "fail", "submit"])
def test_who_is_heard_before_that_sweep_has_the_same_grace(asleep: World, asks):
    before = asleep.task(asleep.held.task_id)

    answer = getattr(asleep, asks)(asleep.held)

    assert before.expires_at < asleep.clock.now()
    if asks == "heartbeat":
        assert answer.lease is LeaseState.HELD


def test_a_claim_before_that_sweep_ends_no_lease(asleep: World):
    asleep.register("w2")

    asleep.claim("w2")

    assert asleep.task(asleep.held.task_id).lease_worker_id == "w1"


def test_a_lease_that_nobody_renews_after_a_sleep_runs_out(asleep: World):
    for _ in range(31):
        do_sweep(asleep)
        asleep.clock.advance(1.0)

    assert asleep.task(asleep.held.task_id).state == "pending"


def test_sweeps_that_come_a_little_late_give_nothing(running: World):
    task = running.claimed()
    for _ in range(4):
        do_sweep(running)
        running.clock.advance(10.0)

    assert running.task(task.task_id).state == "pending"


def test_a_sweep_without_anything_due_changes_nothing(running: World):
    running.claimed()
    before = running.everything()

    do_sweep(running)

    assert running.everything() == before


def test_a_corpus_that_appears_gets_its_run(world: World):
    world.fleet.manifest = None

    do_sweep(world)

    assert world.fleet.the_manifest().vocab_size == 16
    assert world.run_row().preset == "tiny"


def test_the_clock_goes_on_from_where_it_was_kept(running: World):
    running.clock.advance(1e9)
    running.do(keep_clock(running.fleet))

    kept = running.read(clock.ran_until)

    assert kept == running.clock.now()
    assert LeaseClock(kept).now() >= kept
    running.clock.advance(1.0)
    running.do(keep_clock(running.fleet))
    assert running.read(clock.ran_until) == kept + 1.0


def test_after_a_restart_the_clock_is_past_every_claim(running: World):
    running.do(keep_clock(running.fleet))
    running.clock.advance(8.0)
    task = running.claimed()  # and the coordinator dies; its wall clock is set back

    ran_until = running.read(clock.ran_until)

    begun = LeaseClock(ran_until, wall=lambda: 0.0, monotonic=lambda: 5.0).now()
    assert begun >= running.task(task.task_id).claimed_at


def test_what_fails_is_logged_and_tried_again(caplog):
    async def story():
        calls, third = [], asyncio.Event()

        async def act():
            calls.append(None)
            if len(calls) == 1:
                raise ZeroDivisionError
            if len(calls) == 3:
                third.set()

        task = asyncio.ensure_future(every(0.0, act, "a thing"))
        await asyncio.wait_for(third.wait(), 10.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())

    assert "a thing failed" in caplog.text


def test_a_fleet_without_a_run_can_be_swept(world: World):
    do_sweep(world)

    assert world.read(runs.newest_run) is None
