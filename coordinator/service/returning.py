"""How a lease ends without a submission: released, failed, run out, or taken away.

The task goes back to pending under the same id, or is given up after its last
attempt. What became of its round is decided in the same transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy import Connection

from bitnet_ext.wire.messages import FailRequest, ReleaseRequest, TaskAnswer
from bitnet_ext.wire.verdicts import ErrorCode, FailCode, TaskState
from coordinator.domain import leases
from coordinator.domain.accounting import Fate, fate_of_expired
from coordinator.domain.errors import RefusedError
from coordinator.domain.rounds import ClaimedWork, stops_waiting_at
from coordinator.service.bookkeeping import book_end
from coordinator.service.fleet import RUNNING, Fleet
from coordinator.service.grace import awake
from coordinator.service.own_files import look_after
from coordinator.service.replanning import adopt_where_idle
from coordinator.service.roster import heartbeat_s, plan_of
from coordinator.service.seeding import add_epoch_if_done
from coordinator.store import rounds, runs, tasks, workers
from coordinator.store.rows import TaskRow

log = logging.getLogger(__name__)


async def release(fleet: Fleet, task_id: str, request: ReleaseRequest) -> TaskAnswer:
    """Give a task back; this counts as an attempt only where it goes round and round.

    Raises RefusedError: unknown_task, lease_lost.
    """
    reason = request.reason or "released"

    def give_back(connection: Connection, task: TaskRow, now: float) -> TaskState:
        is_free = leases.release_is_free(
            num_leases=task.num_leases,
            attempt=task.attempt,
            tokens_done=task.tokens_done,
        )
        if is_free:
            return _attempt_returned(connection, task, reason, now)
        rest_s = leases.backoff_s(task.attempt, fleet.rng.uniform(0.0, 1.0))
        return _attempt_lost(connection, task, "released", reason, now, rest_s)

    return await _end_held(fleet, task_id, request.lease_id, "released", give_back)


async def fail(fleet: Fleet, task_id: str, request: FailRequest) -> TaskAnswer:
    """Take note that a worker cannot do a task; after the last attempt it is failed.

    Where a file of ours is to blame, it does not count as an attempt. Raises
    RefusedError: unknown_task, lease_lost.
    """
    reason = f"{request.code}: {request.message}"
    is_ours = await _is_our_fault(fleet, task_id, request, await awake(fleet))

    def give_up(connection: Connection, task: TaskRow, now: float) -> TaskState:
        if is_ours:
            return _attempt_returned(connection, task, reason, now)
        rest_s = leases.backoff_s(task.attempt, fleet.rng.uniform(0.0, 1.0))
        return _attempt_lost(connection, task, "failed", reason, now, rest_s)

    outcome = "released" if is_ours else "failed"
    return await _end_held(fleet, task_id, request.lease_id, outcome, give_up)


async def _end_held(
    fleet: Fleet,
    task_id: str,
    lease_id: str,
    outcome: str,
    put_back: Callable[[Connection, TaskRow, float], TaskState],
) -> TaskAnswer:
    """End a lease as its worker asked, and tell all whom that concerns."""
    now = await awake(fleet)

    def end(connection: Connection) -> TaskAnswer:
        task = held_task(connection, task_id, lease_id, now)
        state = put_back(connection, task, now)
        _after(connection, fleet, task, outcome, now)
        return TaskAnswer(task_id=task.task_id, state=state)

    answer = await fleet.store.write(end)
    ring(fleet)
    return answer


async def _is_our_fault(
    fleet: Fleet, task_id: str, request: FailRequest, now: float
) -> bool:
    """Return whether a file that a worker could not use is broken, or was."""
    task = await fleet.store.read(
        lambda connection: held_task(connection, task_id, request.lease_id, now)
    )
    match request.code:
        case FailCode.BAD_SHARD:
            return await look_after(fleet, task.shard_id)
        case FailCode.BAD_WEIGHTS if task.base_version is not None:
            return await look_after(fleet, task.base_version)
        case _:
            return False


async def sweep_leases(fleet: Fleet) -> int:
    """End every lease that has run out; return how many."""
    now = await awake(fleet)

    def end(connection: Connection) -> int:
        overdue = expire_overdue(connection, fleet, now)
        return overdue + end_late(connection, fleet, now)

    count = await fleet.store.write(end)
    fleet.swept_at = fleet.clock.monotonic()
    if count:
        ring(fleet)
    return count


def expire_overdue(connection: Connection, fleet: Fleet, now: float) -> int:
    """Do the same inside the caller's transaction."""
    late = tasks.overdue(connection, now)
    for task in late:
        silent = (task.expires_at or 0.0) <= now
        reason = "lease expired" if silent else "took longer than its limit"
        end_lease(connection, fleet, task, "expired", reason, now)
    return len(late)


def end_lease(
    connection: Connection,
    fleet: Fleet,
    task: TaskRow,
    outcome: str,
    reason: str,
    now: float,
) -> None:
    """End the lease of a worker that has no say in it; its attempt is lost."""
    workers.change_worker(connection, task.lease_worker_id or "", lease_lost_at=now)
    _attempt_lost(connection, task, outcome, reason, now, 0.0)
    _after(connection, fleet, task, outcome, now)


def end_late(connection: Connection, fleet: Fleet, now: float) -> int:
    """End the leases that the open round no longer waits for; return how many.

    That is nobody's failure: it does not count as an attempt.
    """
    run = runs.newest_run(connection)
    live = None if run is None else rounds.live_round(connection, run.run_id)
    if run is None or live is None or live.state != "open":
        return 0
    quorum = plan_of(run).quorum
    if quorum >= 1.0:  # it waits for all: each second, so nobody is looked up for it
        return 0
    claimed = _claimed_work(connection, live.round_id)
    due = stops_waiting_at(claimed, quorum=quorum, round_s=live.round_s)
    if due is None or now < due:
        return 0
    out = [
        task
        for task in tasks.all_leased(connection, run.run_id)
        if task.round_id == live.round_id
    ]
    for task in out:
        _attempt_returned(connection, task, "its round went on without it", now)
        _after(connection, fleet, task, "late", now)
    return len(out)


def _claimed_work(connection: Connection, round_id: int) -> list[ClaimedWork]:
    found = []
    for claim in rounds.claims_of(connection, round_id):
        worker = workers.find_worker(connection, claim.worker_id)
        found.append(
            ClaimedWork(
                num_tokens=claim.num_tokens,
                ended_at=claim.ended_at,
                is_back=claim.outcome == "back",
                is_probe=worker is not None and worker.tokens_per_s is None,
            )
        )
    return found


def held_task(
    connection: Connection, task_id: str, lease_id: str, now: float
) -> TaskRow:
    """Return the task that a lease id is the living right to.

    Raises RefusedError: unknown_task, or lease_lost for a lease that has ended,
    belongs to another claim, or never was.
    """
    task = tasks.find_task(connection, task_id)
    if task is None:
        raise RefusedError(
            ErrorCode.UNKNOWN_TASK,
            f"task_id must name a task, got {task_id!r}",
            field="task_id",
        )
    if not is_held(task, lease_id, now):
        raise lease_lost(task_id)
    return task


def is_held(task: TaskRow, lease_id: str, now: float) -> bool:
    """Return whether this lease id is the living right to a task."""
    return (
        task.state == TaskState.LEASED
        and task.lease_hash == leases.lease_hash(lease_id)
        and leases.ends_at(task.expires_at or 0.0, task.hard_at) > now
    )


def lease_lost(task_id: str) -> RefusedError:
    """Return the refusal of a lease that does not hold its task."""
    return RefusedError(
        ErrorCode.LEASE_LOST,
        f"lease_id does not hold task {task_id}: it ended, or never did",
        field="lease_id",
    )


def settle_round(connection: Connection, round_id: int) -> bool:
    """Return whether a round may close now; one with nothing fresh starts over.

    To be called whenever a lease of the round has ended. What is stale waits for
    something fresh: alone it makes no version, unless the run is over. A round that
    went on without the lease, because each submission makes a version, stays as it is.
    """
    live = rounds.find_round(connection, round_id)
    if live.state != "open" or tasks.count_leased_in_round(connection, round_id):
        return False
    accepted = rounds.accepted_in_round(connection, round_id)
    if any(one.base_version == live.base_version for one in accepted):
        rounds.change_round(connection, round_id, state="closing")
        return True
    rounds.void_claims(connection, round_id)
    tasks.forgive_returns(connection, round_id)
    rounds.change_round(connection, round_id, first_claim_at=None)
    return False


def _attempt_returned(
    connection: Connection, task: TaskRow, reason: str, now: float
) -> TaskState:
    """Put the task back as if this attempt had not been."""
    tasks.return_task(
        connection,
        task.task_id,
        attempt=task.attempt - 1,
        reason=reason,
        not_before_at=now,
        round_id=task.round_id,
    )
    return TaskState.PENDING


def _attempt_lost(
    connection: Connection,
    task: TaskRow,
    outcome: str,
    reason: str,
    now: float,
    rest_s: float,
) -> TaskState:
    """Put the task back, to rest for `rest_s`, or give it up after the last attempt."""
    if task.lease_worker_id is not None:
        workers.count_failure(connection, task.lease_worker_id)
    about = {
        "task_id": task.task_id,
        "worker_id": task.lease_worker_id,
        "attempt": task.attempt,
        "reason": reason,
    }
    log.warning(
        "a task was not done: %s", reason, extra={"event": f"lease.{outcome}", **about}
    )
    if task.attempt >= leases.MAX_ATTEMPTS:
        log.error(
            "a task is given up: %s", reason, extra={"event": "task.failed", **about}
        )
        tasks.fail_task(connection, task.task_id, reason=reason, now=now)
        return TaskState.FAILED
    tasks.return_task(
        connection,
        task.task_id,
        attempt=task.attempt,
        reason=reason,
        not_before_at=now + rest_s,
        round_id=task.round_id,
    )
    return TaskState.PENDING


def _fate(
    connection: Connection, fleet: Fleet, task: TaskRow, outcome: str, now: float
) -> Fate:
    """Return what became of the tokens of a lease that ended without a submission."""
    if outcome != "expired":
        return Fate(outcome)
    worker = workers.find_worker(connection, task.lease_worker_id or "")
    if worker is None:
        return Fate.SILENT
    return fate_of_expired(
        expires_at=task.expires_at or 0.0,
        hard_at=task.hard_at,
        heartbeat_at=worker.heartbeat_at,
        ttl_s=leases.ttl_s(heartbeat_s(fleet, worker)),
        now=now,
    )


def _after(
    connection: Connection, fleet: Fleet, task: TaskRow, outcome: str, now: float
) -> None:
    """Tell the books, the round, the epoch and the story that a lease has ended."""
    fate = _fate(connection, fleet, task, outcome, now)
    workers.add_event(
        connection,
        at=now,
        kind=f"lease.{outcome}",
        body={
            "task_id": task.task_id,
            "worker_id": task.lease_worker_id,
            "fate": fate,
            "tokens": task.tokens_done,
        },
    )
    if task.round_id is None:
        return
    book_end(connection, task, outcome=outcome, fate=fate, now=now)
    settle_round(connection, task.round_id)
    adopt_where_idle(connection, fleet, now)
    run = runs.newest_run(connection)
    if run is not None and run.state == RUNNING:
        add_epoch_if_done(connection, run, fleet.the_manifest(), now)


def ring(fleet: Fleet) -> None:
    """Wake whoever waits for what the end of a lease may have changed."""
    fleet.round_ready.ring()
    fleet.work.ring()
    fleet.changed.ring()
