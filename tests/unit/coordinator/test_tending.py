"""What an operator does about single workers and tasks, and what holds afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select

from bitnet_ext.wire.verdicts import ErrorCode, LeaseState, Verdict
from coordinator.domain.errors import RefusedError
from coordinator.service.assessing import assess
from coordinator.service.tending import (
    Kicked,
    drain_worker,
    kick_stuck,
    kick_worker,
    put_away,
    readmit_worker,
    requeue_failed,
    resume_worker,
)
from coordinator.store import versions, workers
from coordinator.store.tables import claims, events, tasks
from tests.unit.coordinator.fleets import World, open_world


def drain(world: World, worker_id: str = "w1"):
    return world.do(drain_worker(world.fleet, worker_id))


def kick(world: World, worker_id: str = "w1") -> Kicked:
    return world.do(kick_worker(world.fleet, worker_id))


def kick_all(world: World) -> list[str]:
    return world.do(kick_stuck(world.fleet)).tasks


def away(world: World, worker_id: str = "w1"):
    return world.do(put_away(world.fleet, worker_id))


def requeue(world: World, task_id: str | None = None) -> int:
    return world.do(requeue_failed(world.fleet, task_id))


def word(world: World, worker_id: str = "w1") -> Verdict:
    worker, now = world.worker(worker_id), world.clock.now()
    return world.read(lambda c: assess(c, world.fleet, worker, now))[0]


def story(world: World) -> list[tuple[str, dict[str, object]]]:
    """Return kind and body of everything that happened."""
    rows = world.read(lambda c: list(c.execute(select(events))))
    return [(row.kind, msgspec.json.decode(row.body_json)) for row in rows]


def refused(world: World, act) -> RefusedError:
    """Do what has to be refused, and be sure that nothing has changed."""
    before = world.everything()
    with pytest.raises(RefusedError) as caught:
        world.do(act)
    assert world.everything() == before
    return caught.value


def hang(world: World, worker_id: str = "w1"):
    """Let a worker claim, and then send heartbeats that show nothing new."""
    task = world.claimed(worker_id)
    world.heartbeat(task, worker_id, cpu_s=1.0)
    for _ in range(4):
        world.clock.advance(5.0)
        world.heartbeat(task, worker_id, cpu_s=1.0)
    return task


def failed(world: World) -> str:
    """Let a task be given up; return its id."""
    for _ in range(5):
        task = world.claimed()
        world.fail(task)
        world.clock.advance(60.0)
    return task.task_id


# -- drain -------------------------------------------------------------------------


def test_a_drained_worker_finishes_its_task_and_gets_no_other(running: World):
    task = running.claimed()

    assert drain(running) == [task.task_id]

    assert running.heartbeat(task, tokens_done=8).drain is True
    assert running.submit(task).state == "accepted"
    assert running.close_round()
    assert running.claim() is None
    assert ("worker.drained", {"worker_id": "w1"}) in story(running)


def test_a_drain_survives_a_restart_and_a_registration(tmp_path: Path):
    with open_world(tmp_path) as world:
        world.start_run()
        world.register()
        drain(world)
    with open_world(tmp_path) as again:
        again.register()

        assert again.claim() is None
        assert again.heartbeat().drain is True
        assert word(again) is Verdict.DRAINING


def test_a_drained_worker_gets_no_evaluation_either(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    drain(world)

    assert world.claim() is None


def test_a_worker_that_is_resumed_gets_tasks_again(running: World):
    drain(running)

    running.do(resume_worker(running.fleet, "w1"))

    assert running.heartbeat().drain is False
    assert running.claim() is not None
    assert story(running)[-1] == ("worker.resumed", {"worker_id": "w1"})


def test_who_waits_for_work_hears_of_it_at_once(running: World):
    drain(running)

    async def resume_while_one_waits():
        waiting = asyncio.create_task(running.fleet.work.wait())
        await asyncio.sleep(0)
        await resume_worker(running.fleet, "w1")
        await asyncio.wait_for(waiting, 10.0)

    running.do(resume_while_one_waits())


def test_what_is_done_twice_is_refused(running: World):
    assert (
        "drains, got 'w1'"
        in refused(running, resume_worker(running.fleet, "w1")).message
    )
    drain(running)
    assert (
        "does not drain yet, got 'w1'"
        in refused(running, drain_worker(running.fleet, "w1")).message
    )


@pytest.mark.parametrize(
    "act", [drain_worker, resume_worker, readmit_worker, put_away, kick_worker]
)
def test_a_worker_that_is_not_known_is_named_with_those_near_to_it(running: World, act):
    running.register("birch")

    error = refused(running, act(running.fleet, "brich"))

    assert (error.code, error.field) == (ErrorCode.UNKNOWN_WORKER, "worker_id")
    assert error.message.endswith("got 'brich'; nearest: birch")


# -- gone --------------------------------------------------------------------------


def test_a_lost_worker_is_put_away_and_its_lease_ends(running: World):
    task = running.claimed()
    running.clock.advance(31.0)  # nobody sweeps meanwhile

    assert away(running) == [task.task_id]

    row = running.task(task.task_id)
    assert (row.state, row.attempt, row.reason) == ("pending", 1, "its worker is gone")
    assert word(running) is Verdict.GONE
    assert [kind for kind, _ in story(running)][-2:] == ["worker.gone", "lease.kicked"]


def test_a_lost_worker_comes_back_with_its_next_heartbeat(running: World):
    task = running.claimed()
    running.clock.advance(31.0)
    away(running)

    assert running.claim() is None
    assert running.heartbeat(task).lease is LeaseState.LOST
    assert word(running) is Verdict.STUCK
    running.heartbeat()

    assert word(running) is Verdict.IDLE
    assert running.claim() is not None
    assert ("worker.returned", {"worker_id": "w1"}) in story(running)


def test_a_drained_worker_stays_away_until_it_registers(running: World):
    task = running.claimed()
    drain(running)
    assert away(running) == [task.task_id]

    beat = running.heartbeat(task)
    assert (beat.lease, beat.drain) == (LeaseState.LOST, True)
    assert word(running) is Verdict.GONE

    running.register()
    assert word(running) is Verdict.DRAINING
    assert story(running)[-1] == ("worker.returned", {"worker_id": "w1"})


def test_a_registration_that_brings_nobody_back_says_nothing(running: World):
    running.register()

    assert "worker.returned" not in dict(story(running))


def test_a_worker_that_works_is_not_put_away(running: World):
    running.claimed()

    error = refused(running, put_away(running.fleet, "w1"))

    assert "drains or is lost, got 'w1', which is computing: 0 %" in error.message


def test_a_worker_is_put_away_once(running: World):
    drain(running)
    away(running)

    assert "which is gone" in refused(running, put_away(running.fleet, "w1")).message


def test_who_is_gone_does_not_count_for_the_speed_of_the_fleet(running: World):
    running.register("w2")
    running.set_speed("w1", 10.0)
    running.set_speed("w2", 30.0)
    drain(running)

    away(running)

    assert running.read(workers.fleet_speed) == 30.0


def test_nor_does_who_has_stopped(running: World):
    running.register("w2")
    running.set_speed("w1", 10.0)
    running.set_speed("w2", 30.0)

    running.heartbeat(phase="stopping")

    assert word(running) is Verdict.GONE
    assert running.read(workers.fleet_speed) == 30.0


# -- kick --------------------------------------------------------------------------


def test_a_stuck_worker_is_kicked_and_told(running: World):
    task = hang(running)
    assert word(running) is Verdict.STUCK

    assert kick(running).tasks == [task.task_id]

    row = running.task(task.task_id)
    assert (row.state, row.attempt) == ("pending", 1)
    assert row.reason.startswith("kicked: Heartbeats without progress for 15 s")
    assert running.heartbeat(task).lease is LeaseState.LOST
    with pytest.raises(RefusedError, match="lease_id does not hold"):
        running.submit(task)
    (claim,) = running.read(lambda c: list(c.execute(select(claims))))
    assert claim.ended_at == running.clock.now()
    told = story(running)[-1]
    assert told[0] == "lease.kicked"
    due = {"task_id": task.task_id, "worker_id": "w1", "fate": "kicked", "tokens": 0}
    assert told[1] == due


def test_a_kicked_task_is_pending_at_once_for_others(running: World):
    running.register("w2")
    task = hang(running)
    kick(running)

    assert running.claimed("w2").task_id == task.task_id


def test_the_round_goes_on_without_who_was_kicked(running: World):
    running.register("w2")
    first = running.claimed("w2")
    hang(running)
    running.heartbeat(first, "w2", tokens_done=8)
    running.submit(first, "w2")
    assert running.live_round().state == "open"

    kick(running)

    assert running.live_round().state == "closing"


def test_all_who_stand_still_are_kicked_and_nobody_else(running: World):
    for name in ("w2", "w3"):
        running.register(name)
    works, silent = running.claimed("w2"), running.claimed("w3")
    stuck = hang(running)
    running.heartbeat(works, "w2", tokens_done=8)
    running.clock.advance(11.0)
    running.heartbeat(works, "w2", tokens_done=16)
    running.heartbeat(stuck, "w1", cpu_s=1.0)

    taken = kick_all(running)

    assert set(taken) == {stuck.task_id, silent.task_id}
    assert running.task(works.task_id).state == "leased"
    assert kick_all(running) == []


def test_who_could_not_be_heard_is_not_kicked(running: World):
    running.claimed()
    running.sweep()
    running.fleet.swept_at = running.clock.monotonic()
    running.clock.advance(300.0)  # the coordinator slept

    assert kick_all(running) == []


@pytest.mark.parametrize("holds", [True, False])
def test_a_worker_that_gets_on_is_not_kicked(running: World, holds):
    if holds:
        running.heartbeat(running.claimed(), tokens_done=1)

    error = refused(running, kick_worker(running.fleet, "w1"))

    assert "is stuck or lost, or has no token yet, got 'w1', which is" in error.message
    assert ("computing: 2 %" if holds else "idle and holds none") in error.message


def test_a_worker_that_spins_before_its_first_token_is_kicked_by_name(running: World):
    task = running.claimed()
    for beat in range(1, 20):
        running.clock.advance(5.0)
        running.heartbeat(task, cpu_s=5.0 * beat)
    assert word(running) is Verdict.COMPUTING
    assert kick_all(running) == []

    assert kick(running).tasks == [task.task_id]

    row = running.task(task.task_id)
    assert (row.state, row.attempt) == ("pending", 1)
    assert row.reason == "kicked: 0 % of its task done."
    assert running.heartbeat(task, cpu_s=100.0).lease is LeaseState.LOST


def test_where_the_lease_has_ended_by_itself_a_kick_says_so(running: World):
    task = running.claimed()
    running.clock.advance(31.0)
    running.sweep()
    running.clock.advance(7.0)
    running.heartbeat(task, cpu_s=1.0)
    assert word(running) is Verdict.STUCK

    assert kick(running) == Kicked(tasks=[], ended_s=7.0)

    assert running.task(task.task_id).attempt == 1
    running.heartbeat()  # and has let go
    assert (
        "idle and holds none"
        in refused(running, kick_worker(running.fleet, "w1")).message
    )


def test_a_task_that_hangs_every_worker_is_given_up(running: World):
    for _ in range(5):
        task = hang(running)
        kick(running)

    row = running.task(task.task_id)
    assert (row.state, row.attempt) == ("failed", 5)
    assert row.reason.startswith("kicked: Heartbeats without progress")


# -- requeue -----------------------------------------------------------------------


def test_a_failed_task_gets_five_new_attempts(running: World):
    task_id = failed(running)

    assert requeue(running, task_id) == 1

    row = running.task(task_id)
    assert (row.state, row.attempt, row.reason) == ("pending", 0, None)
    raw = running.read(
        lambda c: c.execute(select(tasks.c).where(tasks.c.task_id == task_id)).one()
    )
    assert (raw.done_at, raw.not_before_at) == (None, 0.0)
    assert failed(running) == task_id
    about = {"run_id": "r-1", "task_id": task_id, "tasks": 1}
    assert ("tasks.requeued", about) in story(running)


def test_all_failed_tasks_are_requeued_together(running: World):
    ids = {failed(running) for _ in range(3)}

    assert requeue(running) == 3

    assert {running.task(task_id).state for task_id in ids} == {"pending"}
    before = running.everything()
    assert requeue(running) == 0
    assert running.everything() == before


def test_a_requeued_task_is_trained_and_counts(running: World):
    task_id = failed(running)
    requeue(running)

    task = running.claimed()
    assert task.task_id == task_id
    running.submit(task)

    assert running.task(task_id).state == "done"


def test_a_score_of_a_version_that_is_not_kept_stays_failed(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    task_id = failed(world)
    world.write(lambda c: versions.mark_pruned(c, [1]))

    assert requeue(world) == 0
    error = refused(world, requeue_failed(world.fleet, task_id))
    assert "the score of version 1, which is not kept" in error.message


def test_a_run_that_is_finished_gets_no_task_back(running: World):
    task_id = failed(running)
    running.change_run(state="finished")

    assert (
        "give it time first"
        in refused(running, requeue_failed(running.fleet, task_id)).message
    )


def test_only_failed_tasks_are_requeued(running: World):
    held = running.claimed().task_id

    error = refused(running, requeue_failed(running.fleet, held))

    assert (error.code, error.field) == (ErrorCode.BAD_REQUEST, "task_id")
    assert f"got {held!r}, which is leased" in error.message


def test_a_task_that_is_not_known_is_named_with_those_near_to_it(running: World):
    task_id = failed(running)

    error = refused(running, requeue_failed(running.fleet, task_id + "0"))

    assert error.code is ErrorCode.UNKNOWN_TASK
    assert f"got '{task_id}0'" in error.message
    assert error.message.endswith(f"nearest: {task_id}")


def test_without_a_run_there_is_nothing_to_requeue(world: World):
    assert refused(world, requeue_failed(world.fleet, None)).code is ErrorCode.NO_RUN
