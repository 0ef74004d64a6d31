"""Heartbeats: a lease lives on as long as they show progress."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from bitnet_ext.wire.messages import HeartbeatAnswer, HeartbeatRequest
from bitnet_ext.wire.verdicts import LeaseState
from coordinator.domain import leases
from coordinator.domain.leases import Reported
from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake
from coordinator.service.returning import is_held
from coordinator.service.roster import heartbeat_s, known_worker
from coordinator.store import tasks, workers
from coordinator.store.rows import TaskRow, WorkerRow


async def heartbeat(fleet: Fleet, request: HeartbeatRequest) -> HeartbeatAnswer:
    """Note that a worker lives and how far it is; renew its lease on progress.

    Raises RefusedError `unknown_worker`.
    """
    now = await awake(fleet)
    answer = await fleet.store.write(
        lambda connection: _heartbeat(connection, fleet, request, now)
    )
    fleet.changed.ring()
    return answer


def _heartbeat(
    connection: Connection, fleet: Fleet, request: HeartbeatRequest, now: float
) -> HeartbeatAnswer:
    worker = known_worker(connection, request.worker_id)
    workers.change_worker(
        connection, worker.worker_id, heartbeat_at=now, phase=request.phase
    )
    interval_s = heartbeat_s(fleet, worker)
    state, lease_s = LeaseState.NONE, 0.0
    if request.task_id is not None:
        expires_at = _renew(connection, request, worker, leases.ttl_s(interval_s), now)
        state = LeaseState.LOST if expires_at is None else LeaseState.HELD
        lease_s = max(0.0, (expires_at or now) - now)
    return HeartbeatAnswer(
        lease=state,
        lease_s=lease_s,
        heartbeat_s=interval_s,
        drain=worker.draining,
    )


def _renew(
    connection: Connection,
    request: HeartbeatRequest,
    worker: WorkerRow,
    ttl_s: float,
    now: float,
) -> float | None:
    """Return until when the lease lives now; None when it is lost."""
    task = tasks.find_task(connection, request.task_id or "")
    if task is None or not is_held(task, request.lease_id or "", now):
        return None
    before = Reported(
        tokens_done=task.tokens_done,
        bytes_done=task.bytes_done,
        cpu_s=task.cpu_s,
        step_s=task.step_s,
    )
    after = Reported(
        # More than there are would be progress without end.
        tokens_done=min(request.tokens_done, task.num_tokens),
        bytes_done=request.bytes_done,
        cpu_s=request.cpu_s,
        step_s=request.step_s,
    )
    changes = _changes(task, before, after, ttl_s, now)
    if worker.tokens_per_s is None:
        changes["hard_at"] = _hard_at(task, after, now)
    tasks.renew_lease(connection, task.task_id, **changes)
    return float(changes["expires_at"])


def _changes(
    task: TaskRow, before: Reported, after: Reported, ttl_s: float, now: float
) -> dict[str, Any]:
    """Return the columns that a heartbeat of a live lease sets."""
    advanced_at = task.progress_at or now
    expires_at = task.expires_at or now
    if leases.shows_progress(
        before,
        after,
        since_advance_s=now - advanced_at,
        advanced_after_s=advanced_at - (task.claimed_at or now),
    ):
        expires_at = max(expires_at, now + ttl_s)
    if leases.advanced(before, after):
        advanced_at = now
    return {
        # A count that went back is noise, such as a heartbeat that was overtaken.
        "tokens_done": max(before.tokens_done, after.tokens_done),
        "bytes_done": max(before.bytes_done, after.bytes_done),
        "cpu_s": max(before.cpu_s, after.cpu_s),
        "step_s": after.step_s,
        "progress_at": advanced_at,
        "expires_at": expires_at,
    }


def _hard_at(task: TaskRow, after: Reported, now: float) -> float | None:
    """Return when the lease of a worker that nobody has measured yet ends for good.

    Its own speed decides, anew at each heartbeat, but only within an hour: what the
    fleet would need says little of a box that may be ten times slower. Before its
    first token, the limit is the one of the claim; once all are done it stays.
    """
    if task.tokens_done >= task.num_tokens:
        return task.hard_at
    predicted = leases.predicted_from_progress(
        num_tokens=task.num_tokens,
        tokens_done=after.tokens_done,
        elapsed_s=now - (task.claimed_at or now),
    )
    if predicted is None:
        return task.hard_at
    own = leases.own_hard_at(task.claimed_at or now, predicted)
    # A limit by the fleet's speed is only ever moved out.
    return own if task.predicted_s is None else max(own, task.hard_at or own)
