"""The roster is bounded: who is long lost makes room, who is needed stays."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.roster import FORGET_AFTER_S, MAX_WORKERS
from coordinator.store import workers
from coordinator.store.tables import events
from coordinator.store.tables import workers as workers_table
from tests.unit.coordinator.fleets import World


def fill(world: World) -> None:
    """Let as many workers as there may be have registered just now."""

    def add(connection):
        for number in range(MAX_WORKERS - workers.count_workers(connection)):
            workers.add_worker(
                connection,
                worker_id=f"x{number}",
                name=f"x{number}",
                cpu_model="fake",
                isa="generic",
                threads=1,
                package_version="0.1.0",
                registered_at=world.clock.now(),
                heartbeat_at=world.clock.now(),
                phase="idle",
            )

    world.write(add)


def known(world: World, worker_id: str) -> bool:
    return world.read(lambda c: workers.find_worker(c, worker_id)) is not None


def count(world: World) -> int:
    return world.read(workers.count_workers)


def forgotten(world: World) -> list[str]:
    return world.read(
        lambda c: [
            body
            for (body,) in c.execute(
                select(events.c.body_json).where(events.c.kind == "worker.forgotten")
            )
        ]
    )


def silent_since(world: World, worker_id: str, at: float) -> None:
    world.write(lambda c: workers.change_worker(c, worker_id, heartbeat_at=at))


def everyone_else(world: World, *, heard_at: float) -> None:
    """Let everybody but w1 have been heard of at `heard_at`."""
    world.write(
        lambda c: c.execute(
            update(workers_table)
            .where(workers_table.c.worker_id != "w1")
            .values(heartbeat_at=heard_at)
        )
    )


def test_a_full_roster_refuses_while_everybody_was_there_within_the_hour(
    running: World,
):
    fill(running)
    running.clock.advance(FORGET_AFTER_S - 1.0)

    with pytest.raises(RefusedError) as caught:
        running.register("fresh")

    assert caught.value.code is ErrorCode.RATE_LIMITED
    assert count(running) == MAX_WORKERS
    running.register("w1")  # one that is known comes back all the same


def test_who_has_been_silent_longest_makes_room(running: World):
    fill(running)
    silent_since(running, "x7", running.clock.now() - 1.0)
    running.clock.advance(FORGET_AFTER_S)

    running.register("fresh")

    assert not known(running, "x7")
    assert forgotten(running) == ['{"worker_id":"x7"}']
    assert known(running, "fresh")
    assert count(running) == MAX_WORKERS


def test_below_the_limit_nobody_is_forgotten(running: World):
    running.clock.advance(100 * FORGET_AFTER_S)

    running.register("fresh")

    assert known(running, "w1")


def test_who_had_work_accepted_goes_after_all_others(running: World):
    running.submit(running.claimed("w1"))
    fill(running)
    silent_since(running, "w1", 0.0)
    running.clock.advance(FORGET_AFTER_S)

    running.register("fresh")
    assert known(running, "w1")

    everyone_else(running, heard_at=running.clock.now())
    running.register("another")
    assert not known(running, "w1")


def test_who_holds_a_task_stays(running: World):
    task = running.claimed("w1")
    fill(running)
    everyone_else(running, heard_at=running.clock.now() + FORGET_AFTER_S)
    running.clock.advance(FORGET_AFTER_S)

    with pytest.raises(RefusedError):
        running.register("fresh")

    assert running.task(task.task_id).lease_worker_id == "w1"
    assert known(running, "w1")


def test_who_was_forgotten_comes_back_and_finds_what_it_did(running: World):
    accepted = running.claimed("w1")
    running.submit(accepted)
    fill(running)
    everyone_else(running, heard_at=running.clock.now() + FORGET_AFTER_S)
    running.clock.advance(FORGET_AFTER_S)
    running.register("fresh")

    with pytest.raises(RefusedError) as caught:
        running.heartbeat(worker_id="w1")
    assert caught.value.code is ErrorCode.UNKNOWN_WORKER
    silent_since(running, "x0", 0.0)
    running.register("w1")

    assert running.worker("w1").tasks_done == 0
    # It had its task of this round.
    assert running.claim("w1") is None
    assert running.close_round()
