"""Heartbeats: progress keeps a lease, presence alone does not."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from bitnet_ext.wire.messages import HeartbeatRequest
from bitnet_ext.wire.verdicts import ErrorCode, LeaseState, WorkerPhase
from coordinator.domain.errors import RefusedError
from coordinator.service.renewing import heartbeat
from coordinator.service.returning import sweep_leases
from coordinator.service.seeding import add_fixed_tasks
from coordinator.store import runs, workers
from tests.fakes import START
from tests.unit.coordinator.fleets import World, body, frame


def limits(world, task):
    row = world.task(task.task_id)
    return row.expires_at, row.hard_at


@pytest.mark.parametrize("progress", [{"tokens_done": 8}, {"bytes_done": 1000}])
def test_progress_moves_the_end_of_the_lease(running: World, progress):
    task = running.claimed()
    running.clock.advance(20.0)

    answer = running.heartbeat(task, **progress)

    assert answer.lease is LeaseState.HELD
    assert (answer.lease_s, answer.heartbeat_s, answer.drain) == (30.0, 5.0, False)
    assert limits(running, task)[0] == START + 50.0


def test_presence_alone_does_not(running: World):
    task = running.claimed()
    running.clock.advance(20.0)

    answer = running.heartbeat(task)

    assert (answer.lease, answer.lease_s) == (LeaseState.HELD, 10.0)
    assert limits(running, task)[0] == START + 30.0
    assert running.worker("w1").heartbeat_at == START + 20.0


def fixed_task(world, speed):
    """Return a claimed task of 8 tokens whose size nobody may change."""
    world.start_run(seeded=False)
    world.register("w1")
    world.set_speed("w1", speed)

    def seed(connection):
        run = runs.newest_run(connection)
        manifest = world.fleet.the_manifest()
        add_fixed_tasks(connection, run, manifest, tokens=8, now=START, rng=world.rng)

    world.write(seed)
    return world.claimed("w1")


def test_cpu_time_counts_for_an_hour_before_the_first_step(running: World):
    task = running.claimed()  # a hard limit of 7,200 s
    for minute in range(1, 121):
        running.clock.advance(29.0)
        answer = running.heartbeat(task, cpu_s=float(minute))
        assert answer.lease is LeaseState.HELD

    # 3480 s are over: the last CPU seconds that count end within the hour.
    for minute in range(121, 127):
        running.clock.advance(29.0)
        answer = running.heartbeat(task, cpu_s=float(minute))

    assert answer.lease is LeaseState.LOST


def test_cpu_time_counts_for_five_steps_and_then_a_stuck_lease_expires(running: World):
    task = running.claimed()
    running.clock.advance(5.0)
    running.heartbeat(task, tokens_done=16, cpu_s=5.0, step_s=2.0)
    running.clock.advance(9.0)
    running.heartbeat(task, tokens_done=16, cpu_s=14.0, step_s=2.0)
    assert limits(running, task)[0] == START + 44.0
    running.clock.advance(1.0)
    running.heartbeat(task, tokens_done=16, cpu_s=15.0, step_s=2.0)
    assert limits(running, task)[0] == START + 44.0

    running.clock.advance(28.9)
    assert running.do(sweep_leases(running.fleet)) == 0
    running.clock.advance(0.1)
    assert running.do(sweep_leases(running.fleet)) == 1
    assert running.task(task.task_id).state == "pending"


def test_before_any_measurement_the_task_itself_sets_the_hard_limit(running: World):
    task = running.claimed()
    assert limits(running, task) == (START + 30.0, START + 7200.0)
    running.clock.advance(10.0)

    running.heartbeat(task, bytes_done=1)
    assert limits(running, task)[1] == START + 7200.0
    running.heartbeat(task, tokens_done=16)  # 64 tokens would take 40 s
    assert limits(running, task)[1] == START + 3 * 40.0 + 60.0
    running.clock.advance(10.0)
    running.heartbeat(task, tokens_done=64)
    assert limits(running, task)[1] == START + 3 * 20.0 + 60.0


def outlived_s(world, task, beat_s=25.0, **progress):
    """Return for how long heartbeats with `progress` keep a lease; a day at most."""
    for beats in range(1, int(86_400 / beat_s)):
        world.clock.advance(beat_s)
        said = {name: value(beats) for name, value in progress.items()}
        if world.heartbeat(task, **said).lease is LeaseState.LOST:
            return world.clock.now() - START
    return 86_400.0


@pytest.mark.parametrize(
    "progress",
    [
        {"tokens_done": lambda n: 1 + n // 1000, "bytes_done": lambda n: n},
        {"bytes_done": lambda n: n},
        {"cpu_s": float},
        {"cpu_s": float, "step_s": lambda n: 1e9},
        {
            "tokens_done": lambda n: 1,
            "cpu_s": float,
            "step_s": lambda n: 1e9,
            "bytes_done": lambda n: n // 100,
        },
    ],
    ids=["crumbs", "bytes", "cpu", "long_steps", "all_at_once"],
)
@pytest.mark.parametrize("fleet_speed", [None, 3.2])
def test_nothing_that_an_unmeasured_worker_says_keeps_a_lease_over_two_hours(
    running: World, progress, fleet_speed
):
    running.register("w2")
    if fleet_speed:
        running.set_speed("w2", fleet_speed)
    task = running.claimed()

    assert outlived_s(running, task, **progress) <= 7200.0


def test_more_tokens_than_the_task_has_are_no_progress(running: World):
    task = running.claimed()  # 64 tokens

    assert outlived_s(running, task, tokens_done=lambda n: 64 + n) <= 75.0
    assert running.task(task.task_id).tokens_done in (0, 64)


@pytest.mark.parametrize(
    ("compute_s", "limit_s"), [(80.0, 100.0), (4.0, 60.0), (1e6, 150.0)]
)
def test_a_usual_step_is_without_transfers_and_no_longer_than_the_task(
    running: World, compute_s, limit_s
):
    running.register("w1", heartbeat_s=1.0)
    task = running.claimed()  # 4 steps of 16 tokens, in 120 s
    for beats in range(1, 6):
        running.clock.advance(24.0)
        running.heartbeat(task, bytes_done=beats)
    meta = running.meta(task, compute_s=compute_s)
    running.send(body(meta, frame(task, 0.5)))
    assert running.close_round()

    task = running.claimed()
    began = running.clock.now()
    while running.heartbeat(task, cpu_s=running.clock.monotonic()).lease == "held":
        running.clock.advance(1.0)

    # The last renewal is just before five steps are over, or a minute.
    assert running.clock.now() - began == limit_s - 1.0 + 30.0


def test_once_all_tokens_are_done_the_limit_stays(running: World):
    task = running.claimed()
    running.clock.advance(10.0)
    running.heartbeat(task, tokens_done=64)
    due = START + 3 * 10.0 + 60.0
    running.clock.advance(20.0)

    running.heartbeat(task, tokens_done=64, bytes_done=1000)

    assert limits(running, task) == (START + 60.0, due)


def test_a_box_ten_times_slower_than_the_fleet_finishes_its_first_task(running: World):
    running.register("w2")
    running.set_speed("w2", 3.2)  # 64 tokens in 20 s; here it takes 200
    task = running.claimed("w1")
    for tokens in range(2, 64, 2):
        running.clock.advance(200.0 / 32)
        assert running.heartbeat(task, tokens_done=tokens).lease is LeaseState.HELD
    running.clock.advance(200.0 / 32)

    assert running.submit(task).state == "accepted"


@pytest.mark.parametrize(
    ("own", "of_another", "due_s"),
    [(None, None, 7200.0), (8.0, 2.0, 97.5), (None, 2.0, 7200.0)],
)
def test_an_evaluation_has_a_hard_limit_too(world: World, own, of_another, due_s):
    world.start_run(scored=True, seeded=False)
    world.register("w1")
    world.register("w2")
    for worker_id, speed in (("w1", own), ("w2", of_another)):
        if speed:
            world.set_speed(worker_id, speed)

    task = world.claimed("w1")  # 100 tokens

    assert task.kind == "evaluate"
    assert limits(world, task)[1] - START == pytest.approx(due_s)


def test_the_speed_of_the_fleet_limits_no_worker_that_nobody_has_measured(
    running: World,
):
    running.register("w2")
    running.set_speed("w2", 3.2)
    task = running.claimed("w1")  # 64 tokens: 20 s by the fleet's speed
    assert limits(running, task)[1] - START == 7200.0
    running.clock.advance(29.0)

    running.heartbeat(task, tokens_done=1)

    assert limits(running, task)[1] - START == pytest.approx(3 * 64 * 29 + 60)


def test_progress_never_brings_the_end_of_a_lease_nearer(running: World):
    running.register("w1", heartbeat_s=60.0)
    task = running.claimed()
    running.register("w1", heartbeat_s=5.0)

    answer = running.heartbeat(task, tokens_done=1)

    assert answer.lease_s == 360.0


def test_the_page_is_told_of_a_heartbeat(running: World):
    request = HeartbeatRequest(worker_id="w1", phase=WorkerPhase.IDLE)

    async def story():
        waiting = asyncio.create_task(running.fleet.changed.wait())
        await asyncio.sleep(0)  # it waits
        await heartbeat(running.fleet, request)
        async with asyncio.timeout(10.0):
            await waiting

    running.do(story())


def test_an_evaluation_that_never_ends_is_taken_away(world: World):
    world.start_run(scored=True, seeded=False)
    world.register("w1")
    task = world.claimed("w1")

    assert outlived_s(world, task, bytes_done=lambda n: n) <= 7200.0


def test_a_measured_speed_sets_the_hard_limit_once(running: World):
    running.set_speed("w1", 8.0)
    task = running.claimed()
    due = START + 3 * 60.0 + 60.0
    assert limits(running, task)[1] == due
    running.clock.advance(10.0)

    running.heartbeat(task, tokens_done=1)

    assert limits(running, task)[1] == due


def test_a_steady_worker_that_cannot_be_in_time_loses_its_task_early(running: World):
    running.set_speed("w1", 2.0)
    running.write(lambda c: workers.change_worker(c, "w1", spread=0.05))
    task = running.claimed()  # 120 tokens, 60 s; its limit is 240 s

    lost_after = next(
        6.0 * done
        for done in range(1, 40)
        if beaten(running, task, done) is LeaseState.LOST
    )

    # One and a half times 60 s and a minute; it is noticed at the next heartbeat.
    assert lost_after == 156.0


def beaten(world: World, task, done):
    world.clock.advance(6.0)
    return world.heartbeat(task, tokens_done=done).lease


def test_an_unmeasured_worker_is_predicted_by_the_fleet(running: World):
    running.register("w2")
    running.set_speed("w2", 3.2)

    task = running.claimed("w1")  # 64 tokens, 20 s

    assert running.task(task.task_id).predicted_s == pytest.approx(20.0)


def test_a_speed_that_falls_with_each_task_holds_no_round_longer(running: World):
    spans = []
    for _ in range(6):
        task = running.claimed()
        due = limits(running, task)[1]
        spans.append(due - running.clock.now())
        for beats in range(1, 1000):
            if running.clock.now() + 25.0 >= due:
                break
            running.clock.advance(25.0)
            running.heartbeat(task, bytes_done=beats)
        running.submit(task)
        assert running.close_round()

    assert spans[0] == 7200.0
    # Of one step: no longer than one that nobody has measured.
    assert max(spans[1:]) == pytest.approx(7200.0)


@pytest.mark.parametrize(
    ("speed", "due_s"),
    # Of one step: that counts five times.
    [(0.1, 5 * 80.0 + 60.0), (0.01, 5 * 800.0 + 60.0), (0.001, 3 * 7200.0 + 60.0)],
)
def test_a_task_of_a_fixed_size_may_take_longer_than_rounds(world: World, speed, due_s):
    task = fixed_task(world, speed)

    assert limits(world, task)[1] - START == pytest.approx(due_s)


def test_a_heartbeat_cannot_revive_a_lease(running: World):
    task = running.claimed()
    running.clock.advance(30.0)

    answer = running.heartbeat(task, tokens_done=64)

    assert (answer.lease, answer.lease_s) == (LeaseState.LOST, 0.0)
    assert running.task(task.task_id).tokens_done == 0


@pytest.mark.parametrize(
    "change", [{"lease_id": "0" * 32}, {"task_id": "t-unknown"}], ids=["lease", "task"]
)
def test_a_foreign_lease_is_lost_and_moves_nothing(running: World, change):
    task = running.claimed()
    running.register("w2")
    before = running.task(task.task_id)
    running.clock.advance(20.0)

    answer = running.heartbeat(
        msgspec.structs.replace(task, **change), "w2", tokens_done=64
    )

    assert answer.lease is LeaseState.LOST
    assert running.task(task.task_id) == before


def test_without_a_task_there_is_no_lease_to_speak_of(running: World):
    answer = running.heartbeat(phase=WorkerPhase.IDLE)

    assert (answer.lease, answer.lease_s) == (LeaseState.NONE, 0.0)
    assert running.worker("w1").phase == "idle"


def test_drain_reaches_a_worker_on_its_next_heartbeat(running: World):
    task = running.claimed()
    running.write(lambda c: workers.change_worker(c, "w1", draining=True))

    answer = running.heartbeat(task, tokens_done=1)

    assert (answer.drain, answer.lease) == (True, LeaseState.HELD)
    running.register("w1")
    assert running.heartbeat().drain is True


def test_the_wish_of_a_worker_for_its_heartbeat_counts(running: World):
    running.register("w1", heartbeat_s=10.0)

    task = running.claimed()
    running.clock.advance(10.0)
    answer = running.heartbeat(task, tokens_done=1)

    assert (task.lease_s, answer.lease_s, answer.heartbeat_s) == (60.0, 60.0, 10.0)


def test_a_heartbeat_that_was_overtaken_takes_nothing_back(running: World):
    task = running.claimed()
    running.clock.advance(10.0)
    running.heartbeat(task, tokens_done=32, bytes_done=100, cpu_s=9.0)
    running.clock.advance(1.0)

    running.heartbeat(task, tokens_done=16, bytes_done=50, cpu_s=4.0)

    row = running.task(task.task_id)
    assert (row.tokens_done, row.bytes_done, row.cpu_s) == (32, 100, 9.0)
    assert row.expires_at == START + 40.0


def test_an_unknown_worker_is_refused(running: World):
    with pytest.raises(RefusedError) as caught:
        running.heartbeat(worker_id="w9")

    assert caught.value.code is ErrorCode.UNKNOWN_WORKER


def test_cpu_time_is_counted_from_the_last_token_or_byte(running: World):
    task = running.claimed()
    seen = []
    for said in (
        {"cpu_s": 5000.0},  # an old process: what it used before is not of this task
        {"cpu_s": 5004.0},
        {"cpu_s": 5010.0, "tokens_done": 8},
        {"cpu_s": 5013.0, "tokens_done": 8},
        {"cpu_s": 5014.0, "tokens_done": 8, "bytes_done": 1},
        {"cpu_s": 5016.5, "tokens_done": 8, "bytes_done": 1},
    ):
        running.clock.advance(5.0)
        running.heartbeat(task, **said)
        row = running.task(task.task_id)
        seen.append(row.cpu_s - row.progress_cpu_s)

    assert seen == [0.0, 4.0, 0.0, 3.0, 0.0, 2.5]
    running.release(task)
    assert running.task(task.task_id).progress_cpu_s is None
