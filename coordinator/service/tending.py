"""What an operator does about single workers and tasks.

Drain a worker or let it work again, put one away, end the lease of one that is stuck,
and give failed tasks another try. What can't be done changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import ErrorCode, TaskState, Verdict
from coordinator.domain.errors import RefusedError
from coordinator.domain.near import nearest
from coordinator.service.assessing import assess
from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake
from coordinator.service.returning import end_lease, ring
from coordinator.service.steering import check_running, the_run
from coordinator.store import tasks, workers
from coordinator.store.rows import RunRow, WorkerRow

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Failed tasks that a mistyped id is compared with.
_MOST_NAMES: Final = 1000
#: Whose task may be taken away by hand.
_STANDS_STILL: Final = (Verdict.STUCK, Verdict.LOST)


class Kicked(msgspec.Struct, frozen=True, kw_only=True):
    """What a kick came to."""

    #: Ids of the tasks that were taken.
    tasks: list[str]
    #: Where nothing was left to take: for how long the lease of that worker has been
    #: over.
    ended_s: float | None = None


async def drain_worker(fleet: Fleet, worker_id: str) -> list[str]:
    """Give a worker no more tasks; return those that it still holds.

    It is told by the answer to its next heartbeat. Raises RefusedError:
    unknown_worker, bad_request where it drains already.
    """

    def change(connection: Connection, now: float) -> list[str]:
        worker = _named(connection, worker_id)
        if worker.draining:
            raise _refused(worker_id, "a worker that does not drain yet")
        workers.change_worker(connection, worker_id, draining=True)
        _tell(connection, worker_id, now, kind="worker.drained")
        return [task.task_id for task in tasks.leased_to(connection, worker_id)]

    return await _write(fleet, change)


async def resume_worker(fleet: Fleet, worker_id: str) -> None:
    """Give a worker that drains tasks again.

    Raises RefusedError: unknown_worker, bad_request where it does not drain.
    """

    def change(connection: Connection, now: float) -> None:
        worker = _named(connection, worker_id)
        if not worker.draining:
            raise _refused(worker_id, "a worker that drains")
        workers.change_worker(connection, worker_id, draining=False)
        _tell(connection, worker_id, now, kind="worker.resumed")

    await _write(fleet, change)


async def readmit_worker(fleet: Fleet, worker_id: str) -> None:
    """End the quarantine of a worker; what was left out before counts no more.

    Raises RefusedError: unknown_worker, bad_request where it is in none.
    """

    def change(connection: Connection, now: float) -> None:
        worker = _named(connection, worker_id)
        if worker.quarantined_at is None:
            raise _refused(worker_id, "a worker in quarantine")
        workers.change_worker(
            connection,
            worker_id,
            quarantined_at=None,
            quarantine_reason=None,
            judged_from=now,
        )
        _tell(connection, worker_id, now, kind="worker.readmitted")

    await _write(fleet, change)


async def put_away(fleet: Fleet, worker_id: str) -> list[str]:
    """Put a worker away that drains or is lost; return the tasks taken from it.

    It is not counted among the fleet until it comes back: when it registers, or, where
    it does not drain, with its next heartbeat. Raises RefusedError: unknown_worker,
    bad_request where it does neither, or is gone already.
    """

    def change(connection: Connection, now: float) -> list[str]:
        worker = _named(connection, worker_id)
        word, evidence = assess(connection, fleet, worker, now)
        if word is Verdict.GONE or not (worker.draining or word is Verdict.LOST):
            raise _refused(worker_id, "a worker that drains or is lost", word, evidence)
        workers.change_worker(connection, worker_id, gone_at=now)
        _tell(connection, worker_id, now, kind="worker.gone")
        held = tasks.leased_to(connection, worker_id)
        for task in held:
            end_lease(connection, fleet, task, "kicked", "its worker is gone", now)
        return [task.task_id for task in held]

    return await _write(fleet, change)


async def kick_stuck(fleet: Fleet) -> Kicked:
    """End the leases of all workers that are stuck or lost. The attempts count."""

    def change(connection: Connection, now: float) -> Kicked:
        kicked = []
        for worker in workers.all_workers(connection):
            word, evidence = assess(connection, fleet, worker, now)
            if word in _STANDS_STILL:
                kicked += _take(connection, fleet, worker, evidence, now)
        return Kicked(tasks=kicked)

    return await _write(fleet, change)


async def kick_worker(fleet: Fleet, worker_id: str) -> Kicked:
    """End the lease of a worker that is stuck or lost, or has trained no token of it.

    Before the first token nothing is wasted, and nobody can tell a worker that spins
    from one that prepares, so whoever names it decides. The attempt counts. One that
    still lives is told so by the answer to its next heartbeat. Raises RefusedError:
    unknown_worker, bad_request where it gets on with its task, or has had none.
    """

    def change(connection: Connection, now: float) -> Kicked:
        worker = _named(connection, worker_id)
        held = tasks.leased_to(connection, worker_id)
        if not held and worker.lease_lost_at is not None:
            return Kicked(tasks=[], ended_s=now - worker.lease_lost_at)
        word, evidence = assess(connection, fleet, worker, now)
        has_begun = any(task.tokens_done for task in held)
        if not held or (has_begun and word not in _STANDS_STILL):
            due = "a worker that holds a task and is stuck or lost, or has no token yet"
            found = word if held else f"{word} and holds none"
            raise _refused(worker_id, due, found, evidence)
        return Kicked(tasks=_take(connection, fleet, worker, evidence, now))

    return await _write(fleet, change)


def _take(
    connection: Connection, fleet: Fleet, worker: WorkerRow, evidence: str, now: float
) -> list[str]:
    """End what leases a worker has; return the ids of their tasks."""
    held = tasks.leased_to(connection, worker.worker_id)
    for task in held:
        end_lease(connection, fleet, task, "kicked", f"kicked: {evidence}", now)
    return [task.task_id for task in held]


async def requeue_failed(fleet: Fleet, task_id: str | None) -> int:
    """Make failed tasks of the run pending again, attempts anew; return how many.

    `task_id` None: all of them, but for scores of versions that are not kept. Raises
    RefusedError: no_run, unknown_task, bad_request where the run is finished, or the
    task is not one that can be tried again.
    """

    def change(connection: Connection, now: float) -> int:
        run = the_run(connection)
        check_running(run)
        count = tasks.requeue_failed(connection, run.run_id, task_id)
        if task_id is not None and count == 0:
            raise _not_requeued(connection, run, task_id)
        if count:
            workers.add_event(
                connection,
                at=now,
                kind="tasks.requeued",
                body={"run_id": run.run_id, "task_id": task_id, "tasks": count},
            )
        return count

    return await _write(fleet, change)


async def _write(fleet: Fleet, change: Callable[[Connection, float], T]) -> T:
    """Do it in one transaction, and wake whoever waits for what it may have changed."""
    now = await awake(fleet)
    done = await fleet.store.write(lambda connection: change(connection, now))
    ring(fleet)
    return done


def _named(connection: Connection, worker_id: str) -> WorkerRow:
    worker = workers.find_worker(connection, worker_id)
    if worker is None:
        known = [row.worker_id for row in workers.all_workers(connection)]
        raise RefusedError(
            ErrorCode.UNKNOWN_WORKER,
            f"worker_id must be of a registered worker, got {worker_id!r}"
            f"{nearest(worker_id, known)}",
            field="worker_id",
        )
    return worker


def _refused(
    worker_id: str, due: str, word: str | None = None, evidence: str = ""
) -> RefusedError:
    found = "" if word is None else f", which is {word}: {evidence}"
    return RefusedError(
        ErrorCode.BAD_REQUEST,
        f"worker_id must be of {due}, got {worker_id!r}{found}",
        field="worker_id",
    )


def _not_requeued(connection: Connection, run: RunRow, task_id: str) -> RefusedError:
    task = tasks.find_task(connection, task_id)
    if task is None:
        failed = tasks.latest_failed(connection, run.run_id, _MOST_NAMES)
        known = [row.task_id for row in failed]
        return RefusedError(
            ErrorCode.UNKNOWN_TASK,
            f"task_id must be of a failed task, got {task_id!r}, which is none"
            f"{nearest(task_id, known)}",
            field="task_id",
        )
    found = task.state
    if task.run_id != run.run_id:
        found = f"of run {task.run_id}, which has ended"
    elif task.state == TaskState.FAILED:
        found = f"the score of version {task.version}, which is not kept"
    return RefusedError(
        ErrorCode.BAD_REQUEST,
        f"task_id must be of a failed task of this run, got {task_id!r}, which is "
        f"{found}",
        field="task_id",
    )


def _tell(connection: Connection, worker_id: str, now: float, *, kind: str) -> None:
    log.info(
        "an operator changed worker %s",
        worker_id,
        extra={"event": kind, "worker_id": worker_id},
    )
    workers.add_event(connection, at=now, kind=kind, body={"worker_id": worker_id})
