"""SQL of tasks: one holder each, moves that check the state they leave."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import IntegrityError

from bitnet_ext.wire.verdicts import TaskKind, TaskState
from coordinator.store import tasks
from tests.fakes import START
from tests.unit.coordinator.fleets import World


@pytest.fixture
def world(world: World) -> World:
    world.start_run(seeded=False)
    return world


def add(world, task_id, **columns):
    said = {
        "run_id": "r-1",
        "kind": TaskKind.TRAIN,
        "epoch": 1,
        "shard_id": "train-00000",
        "start_token": 0,
        "num_tokens": 64,
        "fixed_size": False,
        "created_at": START,
    }
    world.write(lambda c: tasks.add_task(c, task_id=task_id, **said | columns))


def lease(world, task_id, claim_id="c-1", **columns):
    said = {
        "lease_hash": "ab" * 32,
        "lease_claim_id": claim_id,
        "lease_worker_id": "w1",
        "lease_terms_json": "{}",
        "expires_at": START + 30,
    }
    world.write(lambda c: tasks.lease_task(c, task_id, **said | columns))


def give_back(world, task_id, **columns):
    said = {"attempt": 1, "reason": "r", "not_before_at": START, "round_id": None}
    world.write(lambda c: tasks.return_task(c, task_id, **said | columns))


def pending(world, now=START, round_id=None):
    found = world.read(
        lambda c: tasks.next_pending(
            c, run_id="r-1", kind=TaskKind.TRAIN, now=now, round_id=round_id
        )
    )
    return None if found is None else found.task_id


def test_a_task_is_leased_once(world):
    add(world, "t-1")
    lease(world, "t-1", "c-1")

    with pytest.raises(LookupError, match="t-1 is not pending"):
        lease(world, "t-1", "c-2")

    assert world.task("t-1").lease_claim_id == "c-1"
    assert world.task("t-1").attempt == 1


def test_one_claim_never_holds_two_tasks(world):
    add(world, "t-1")
    add(world, "t-2")
    lease(world, "t-1", "c-1")

    with pytest.raises(IntegrityError):
        lease(world, "t-2", "c-1")

    assert world.task("t-2").state == TaskState.PENDING


def test_leased_and_having_a_lease_are_the_same(world):
    add(world, "t-1")

    with pytest.raises(IntegrityError, match="task_lease"):
        lease(world, "t-1", lease_hash=None)


@pytest.mark.parametrize(
    "leave",
    [
        lambda c: tasks.finish_task(c, "t-1", START),
        lambda c: tasks.fail_task(c, "t-1", reason="r", now=START),
        lambda c: tasks.return_task(
            c, "t-1", attempt=1, reason="r", not_before_at=START, round_id=None
        ),
    ],
)
def test_a_lease_ends_once_and_leaves_nothing_behind(world, leave):
    add(world, "t-1")
    lease(world, "t-1", round_id=3, base_version=1, hard_at=START + 99)

    world.write(leave)

    task = world.task("t-1")
    assert task.state != TaskState.LEASED
    assert (task.lease_hash, task.lease_claim_id, task.lease_worker_id) == (None,) * 3
    assert (task.expires_at, task.hard_at, task.round_id) == (None,) * 3
    with pytest.raises(LookupError, match="t-1 is not leased"):
        world.write(leave)


def test_old_epochs_go_first_then_old_tasks(world):
    add(world, "t-a", epoch=2, created_at=START - 9)
    add(world, "t-b", created_at=START + 1)
    add(world, "t-c", created_at=START + 1)
    add(world, "t-d", created_at=START + 2)

    order = []
    while (found := pending(world, now=START + 9)) is not None:
        order.append(found)
        lease(world, found, claim_id=f"c-{found}")

    assert order == ["t-b", "t-c", "t-d", "t-a"]


def test_a_resting_task_is_not_found_before_its_time(world):
    add(world, "t-1")
    lease(world, "t-1")
    give_back(world, "t-1", not_before_at=START + 5)

    assert pending(world, START + 4.9) is None
    assert pending(world, START + 5) == "t-1"


def test_work_that_came_back_waits_for_another_round(world):
    add(world, "t-1")
    lease(world, "t-1", round_id=1)
    give_back(world, "t-1", round_id=1)

    assert pending(world, round_id=1) is None
    assert pending(world, round_id=2) == "t-1"
    world.write(lambda c: tasks.forgive_returns(c, 1))
    assert pending(world, round_id=1) == "t-1"


def test_a_new_lease_starts_from_nothing(world):
    add(world, "t-1")
    lease(world, "t-1")
    world.write(
        lambda c: tasks.renew_lease(
            c, "t-1", tokens_done=9, bytes_done=9, cpu_s=9.0, step_s=9.0
        )
    )
    give_back(world, "t-1")

    lease(world, "t-1", "c-2")

    task = world.task("t-1")
    assert (task.tokens_done, task.bytes_done, task.cpu_s, task.step_s) == (0, 0, 0, 0)
    assert (task.attempt, task.reason) == (2, None)


def test_a_lease_runs_out_by_either_limit(world):
    for task_id, limits in {
        "t-1": {"expires_at": START + 30},
        "t-2": {"expires_at": START + 90, "hard_at": START + 20},
        "t-3": {"expires_at": START + 90, "hard_at": START + 95},
    }.items():
        add(world, task_id)
        lease(world, task_id, f"c-{task_id}", **limits)

    def late(now):
        return {row.task_id for row in world.read(lambda c: tasks.overdue(c, now))}

    assert late(START + 19) == set()
    assert late(START + 20) == {"t-2"}
    assert late(START + 30) == {"t-1", "t-2"}
    assert late(START + 95) == {"t-1", "t-2", "t-3"}


def test_cancelling_ends_leases_and_spares_what_is_done(world):
    for task_id in ("t-1", "t-2", "t-3"):
        add(world, task_id)
    lease(world, "t-1", "c-1")
    lease(world, "t-2", "c-2")
    world.write(lambda c: tasks.finish_task(c, "t-2", START))

    world.write(lambda c: tasks.cancel_unfinished(c, "r-1", reason="why", now=START))

    states = {name: world.task(name).state for name in ("t-1", "t-2", "t-3")}
    assert states == {"t-1": "failed", "t-2": "done", "t-3": "failed"}
    assert world.task("t-1").lease_hash is None
    assert world.task("t-3").reason == "why"
    assert world.read(lambda c: tasks.count_not_done(c, "r-1")) == {
        "pending": 0,
        "leased": 0,
        "failed": 2,
    }
