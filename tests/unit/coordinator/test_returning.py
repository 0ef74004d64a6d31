"""Leases that end without a submission, and what becomes of task and round."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from sqlalchemy import select

from bitnet_ext.wire.messages import ReleaseRequest
from bitnet_ext.wire.verdicts import ErrorCode, TaskKind
from coordinator.domain.errors import RefusedError
from coordinator.service.returning import release
from coordinator.service.steering import seed_epoch
from coordinator.store import rounds, runs, tasks
from coordinator.store.tables import claims, events
from tests.unit.coordinator.fleets import World


@pytest.fixture
def two(running: World) -> World:
    running.register("w2")
    return running


def sweep(world):
    return world.sweep()


def outcomes(world):
    return [
        row.outcome for row in world.read(lambda c: list(c.execute(select(claims))))
    ]


def kinds(world):
    return [row.kind for row in world.read(lambda c: list(c.execute(select(events))))]


def logged(caplog, event):
    """Return the log records of an event."""
    return [r for r in caplog.records if getattr(r, "event", None) == event]


def pending_at(world, now):
    return world.read(
        lambda c: tasks.next_pending(c, run_id="r-1", kind=TaskKind.TRAIN, now=now)
    )


def test_a_release_does_not_count_as_an_attempt(running: World):
    for _ in range(5):
        task = running.claimed()
        assert running.release(task).state == "pending"

    row = running.task(task.task_id)
    assert (row.state, row.attempt) == ("pending", 0)
    assert running.worker("w1").tasks_failed == 0
    assert kinds(running)[-1] == "lease.released"


def test_a_task_that_is_handed_back_again_and_again_is_given_up(running: World):
    first = running.claimed()
    states = [running.release(first).state]
    while states[-1] == "pending":
        task = running.claimed()
        assert task.task_id == first.task_id
        states.append(running.release(task).state)
        running.clock.advance(60.0)

    assert states == ["pending"] * 9 + ["failed"]
    row = running.task(first.task_id)
    assert (row.attempt, row.reason) == (5, "released")
    assert running.worker("w1").tasks_failed == 5
    assert running.claimed().task_id != first.task_id


def test_the_sixth_release_lets_a_task_rest(running: World):
    for _ in range(6):
        task = running.claimed()
        running.release(task)

    assert running.task(task.task_id).attempt == 1
    assert pending_at(running, running.clock.now()) is None
    assert pending_at(running, running.clock.now() + 2.0).task_id == task.task_id


def test_a_release_after_a_step_takes_no_attempt_however_often(running: World):
    for _ in range(8):
        task = running.claimed()
        running.heartbeat(task, tokens_done=16)
        running.release(task)

    row = running.task(task.task_id)
    assert (row.num_leases, row.attempt) == (8, 0)


def test_a_lease_without_progress_is_free_again_after_its_time(running: World):
    task = running.claimed()
    running.clock.advance(29.9)
    assert sweep(running) == 0
    running.clock.advance(0.1)

    assert sweep(running) == 1

    row = running.task(task.task_id)
    assert (row.state, row.attempt, row.reason) == ("pending", 1, "lease expired")
    assert running.worker("w1").tasks_failed == 1
    assert kinds(running)[-1] == "lease.expired"
    assert sweep(running) == 0


def test_a_task_is_given_up_after_its_fifth_attempt(running: World):
    states = []
    for _ in range(5):
        task = running.claimed()
        running.clock.advance(30.0)
        sweep(running)
        states.append(running.task(task.task_id).state)

    assert states == ["pending"] * 4 + ["failed"]
    assert running.task(task.task_id).reason == "lease expired"
    assert running.claimed().task_id != task.task_id


def test_a_task_that_cannot_be_done_rests_and_says_why(running: World):
    task = running.claimed()

    assert running.fail(task).state == "pending"

    row, now = running.task(task.task_id), running.clock.now()
    assert (row.attempt, row.reason) == (1, "out_of_memory: too large")
    assert running.worker("w1").tasks_failed == 1
    assert kinds(running)[-1] == "lease.failed"
    # Half of the two seconds of a first failure, by the randomness of the fake.
    assert pending_at(running, now + 0.9) is None
    assert pending_at(running, now + 1.0).task_id == task.task_id


def test_a_task_that_fails_again_rests_twice_as_long(running: World):
    for attempt in (1, 2, 3):
        task = running.claimed()
        running.fail(task)
        rest_s = 0.5 * 2**attempt
        now = running.clock.now()
        assert pending_at(running, now + rest_s - 0.1) is None
        assert pending_at(running, now + rest_s).task_id == task.task_id
        running.clock.advance(rest_s)


def test_a_release_keeps_its_reason(running: World):
    task = running.claimed()
    request = ReleaseRequest(worker_id="w1", lease_id=task.lease_id, reason="told to")

    running.do(release(running.fleet, task.task_id, request))

    assert running.task(task.task_id).reason == "told to"


@pytest.mark.parametrize("bell", ["work", "round_ready", "changed"])
def test_whoever_waits_is_woken_when_a_lease_ends(running: World, bell):
    task = running.claimed()
    request = ReleaseRequest(worker_id="w1", lease_id=task.lease_id)

    async def story():
        waiting = asyncio.create_task(getattr(running.fleet, bell).wait())
        await asyncio.sleep(0)  # it waits
        await release(running.fleet, task.task_id, request)
        async with asyncio.timeout(10.0):
            await waiting

    running.do(story())


def test_a_resting_task_does_not_keep_its_worker_from_other_work(running: World):
    task = running.claimed()
    running.fail(task)

    assert running.claimed().task_id != task.task_id


def test_a_task_that_nobody_can_do_is_given_up(running: World):
    for _ in range(5):
        answer = running.fail(task := running.claimed())
        running.clock.advance(60.0)

    assert answer.state == "failed"
    assert running.task(task.task_id).state == "failed"


def test_a_lease_past_its_hard_limit_ends_although_it_is_alive(running: World):
    running.set_speed("w1", 8.0)
    task = running.claimed()  # 480 tokens, predicted 60 s, hard limit 240 s
    for tokens in range(1, 13):
        running.clock.advance(19.0)
        assert running.heartbeat(task, tokens_done=tokens).lease == "held"
    running.clock.advance(12.0)

    assert sweep(running) == 1
    assert running.task(task.task_id).reason == "took longer than its limit"


def test_a_round_without_a_submission_starts_over_and_stays_open(two: World):
    before = two.live_round()
    first, second = two.claimed("w1"), two.claimed("w2")
    assert two.live_round().first_claim_at == two.clock.now()
    two.release(first, "w1")
    two.release(second, "w2")

    live = two.live_round()
    assert (live.round_id, live.state) == (before.round_id, "open")
    assert (live.first_claim_at, live.first_submission_at) == (None, None)
    assert outcomes(two) == ["void", "void"]
    assert not two.close_round()
    assert two.claimed("w1").task_id == first.task_id


def test_returned_work_waits_while_the_round_goes_on(two: World):
    two.register("w3")
    first, second = two.claimed("w1"), two.claimed("w2")
    two.release(first, "w1")
    assert outcomes(two) == ["released", None]

    third = two.claimed("w3")

    assert third.task_id not in (first.task_id, second.task_id)
    two.submit(second, "w2")
    two.submit(third, "w3")
    two.close_round()
    assert two.claimed("w1").task_id == first.task_id


def test_returned_work_is_free_in_the_same_round_once_it_starts_over(two: World):
    two.register("w3")
    first, second = two.claimed("w1"), two.claimed("w2")
    two.release(first, "w1")
    two.release(second, "w2")

    assert two.claimed("w3").task_id == first.task_id


def test_a_round_closes_when_its_last_lease_runs_out(two: World):
    first, _second = two.claimed("w1"), two.claimed("w2")
    two.submit(first, "w1")
    assert two.live_round().state == "open"
    assert not two.close_round()
    two.clock.advance(30.0)

    sweep(two)

    assert two.live_round().state == "closing"
    assert outcomes(two) == ["back", "expired"]
    assert two.close_round()


def test_every_overdue_lease_ends_in_one_sweep(two: World):
    two.claimed("w1")
    two.claimed("w2")
    two.clock.advance(30.0)

    assert sweep(two) == 2
    assert two.live_round().first_claim_at is None


def test_an_evaluation_comes_back_without_touching_the_round(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()
    task = world.claimed()

    assert world.release(task).state == "pending"

    assert outcomes(world) == []
    assert world.claimed().task_id == task.task_id


def leave_eight_tokens(world):
    """Let nothing be left of the epoch but one stretch of eight tokens."""
    world.write(lambda c: runs.drop_ranges(c, "r-1"))
    world.write(
        lambda c: runs.add_range(
            c,
            run_id="r-1",
            epoch=1,
            shard_id="train-00000",
            start_token=0,
            num_tokens=8,
        )
    )


def give_up_the_last_task(world):
    for _ in range(5):
        task = world.claimed()
        assert world.run_row().epoch == 1
        world.clock.advance(30.0)
        sweep(world)
    assert world.task(task.task_id).state == "failed"


def test_giving_up_the_last_task_begins_the_next_epoch(running: World):
    running.train_round(0.5)
    leave_eight_tokens(running)

    give_up_the_last_task(running)

    assert running.run_row().epoch == 2
    assert running.read(lambda c: runs.range_tokens(c, "r-1")) == 1504


def test_a_finished_run_begins_no_epoch_when_its_last_task_is_given_up(running: World):
    running.train_round(0.5)
    leave_eight_tokens(running)
    for _ in range(4):
        running.claimed()
        running.clock.advance(30.0)
        sweep(running)
    running.claimed()
    running.change_run(state="finished")
    running.clock.advance(30.0)

    sweep(running)

    assert running.run_row().epoch == 1


def test_an_epoch_without_an_accepted_task_is_not_followed_by_itself(
    running: World, caplog
):
    leave_eight_tokens(running)

    give_up_the_last_task(running)

    assert running.run_row().epoch == 1
    assert running.claim() is None
    assert kinds(running)[-1] == "epoch.failed"
    assert [r.epoch for r in logged(caplog, "epoch.failed")] == [1]


def test_after_an_epoch_that_failed_another_can_be_seeded(running: World):
    leave_eight_tokens(running)
    give_up_the_last_task(running)

    running.do(seed_epoch(running.fleet, None))

    assert running.run_row().epoch == 2
    assert running.claim() is not None


def test_each_report_and_the_end_of_a_task_are_in_the_log(running: World, caplog):
    for _ in range(5):
        running.fail(task := running.claimed())
        running.clock.advance(60.0)

    reports = logged(caplog, "lease.failed")
    assert [r.attempt for r in reports] == [1, 2, 3, 4, 5]
    (end,) = logged(caplog, "task.failed")
    for record in (*reports, end):
        assert (record.task_id, record.worker_id) == (task.task_id, "w1")
        assert record.reason == "out_of_memory: too large"


def test_a_lease_that_ran_out_is_in_the_log(running: World, caplog):
    task = running.claimed()
    running.clock.advance(30.0)
    sweep(running)

    (record,) = logged(caplog, "lease.expired")
    assert (record.task_id, record.reason) == (task.task_id, "lease expired")


def another_lease(task):
    return msgspec.structs.replace(task, lease_id="0" * 32)


@pytest.mark.parametrize("act", ["release", "fail"])
def test_a_foreign_lease_returns_nothing(running: World, act):
    task = running.claimed()
    before = running.everything()

    with pytest.raises(RefusedError) as caught:
        getattr(running, act)(another_lease(task))

    assert (caught.value.code, caught.value.field) == (ErrorCode.LEASE_LOST, "lease_id")
    assert running.everything() == before


@pytest.mark.parametrize("act", ["release", "fail"])
def test_a_lease_ends_once(running: World, act):
    task = running.claimed()
    running.release(task)
    before = running.everything()

    with pytest.raises(RefusedError) as caught:
        getattr(running, act)(task)

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert running.everything() == before


@pytest.mark.parametrize("act", ["release", "fail"])
def test_a_lease_that_ran_out_is_lost_before_anybody_sweeps(running: World, act):
    task = running.claimed()
    running.clock.advance(30.0)

    with pytest.raises(RefusedError) as caught:
        getattr(running, act)(task)

    assert caught.value.code is ErrorCode.LEASE_LOST


def test_an_unknown_task_is_refused(running: World):
    task = msgspec.structs.replace(running.claimed(), task_id="t-unknown")

    with pytest.raises(RefusedError) as caught:
        running.release(task)

    assert (caught.value.code, caught.value.field) == (
        ErrorCode.UNKNOWN_TASK,
        "task_id",
    )


def test_the_lease_of_an_earlier_attempt_is_lost(two: World):
    first = two.claimed("w1")
    two.clock.advance(30.0)
    again = two.claimed("w2")
    assert again.task_id == first.task_id

    with pytest.raises(RefusedError) as caught:
        two.release(first, "w1")

    assert caught.value.code is ErrorCode.LEASE_LOST
    assert two.task(first.task_id).lease_worker_id == "w2"


def test_a_released_lease_id_is_never_given_out_again(running: World):
    first = running.claimed("w1", "c-same")
    running.release(first)

    again = running.claimed("w1", "c-same")

    assert again.task_id == first.task_id
    assert again.lease_id != first.lease_id


def test_claims_that_still_count_are_those_of_the_round(two: World):
    two.claimed("w1")
    two.claimed("w2")

    round_id = two.live_round().round_id

    found = two.read(lambda c: rounds.claims_of(c, round_id))

    assert [claim.worker_id for claim in found] == ["w1", "w2"]
