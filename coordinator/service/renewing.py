"""Heartbeats: a lease lives on as long as they show progress."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.messages import HeartbeatAnswer, HeartbeatRequest, Task
from bitnet_ext.wire.verdicts import LeaseState
from coordinator.domain import leases, sizing, throughput
from coordinator.domain.leases import Lease, Reported
from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake, lease_of
from coordinator.service.returning import is_held
from coordinator.service.roster import come_back, heartbeat_s, known_worker
from coordinator.store import rounds, tasks, workers
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
    if worker.gone_at is not None and not worker.draining:
        # It was only out of reach. Its process never stopped, so it won't register.
        come_back(connection, worker.worker_id, now)
    interval_s = heartbeat_s(fleet, worker)
    state, lease_s = LeaseState.NONE, 0.0
    if request.task_id is not None:
        expires_at = _renew(connection, request, worker, interval_s, now)
        state = LeaseState.LOST if expires_at is None else LeaseState.HELD
        lease_s = max(0.0, (expires_at or now) - now)
    workers.change_worker(
        connection,
        worker.worker_id,
        heartbeat_at=now,
        phase=request.phase,
        lease_lost_at=worker.lease_lost_at if state is LeaseState.LOST else None,
    )
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
    interval_s: float,
    now: float,
) -> float | None:
    """Return until when the lease lives now; None when it is lost."""
    task = tasks.find_task(connection, request.task_id or "")
    if task is None or not is_held(task, request.lease_id or "", now):
        return None
    found = leases.heard_again(
        lease_of(task, now),
        silence_s=now - worker.heartbeat_at,
        heartbeat_s=interval_s,
    )
    lease = leases.renewed(
        found,
        _said(request),
        ttl_s=leases.ttl_s(interval_s),
        now=now,
        usual_step_s=_usual_step_s(connection, task, worker),
        head_room=throughput.head_room(worker.spread),
    )
    tasks.renew_lease(
        connection,
        task.task_id,
        tokens_done=lease.reported.tokens_done,
        bytes_done=lease.reported.bytes_done,
        cpu_s=lease.reported.cpu_s,
        step_s=lease.reported.step_s,
        progress_at=lease.progress_at,
        progress_cpu_s=_progress_cpu_s(task, lease),
        expires_at=lease.expires_at,
        hard_at=lease.hard_at,
        stalled_at=lease.stalled_at,
    )
    return lease.expires_at


def _said(request: HeartbeatRequest) -> Reported:
    return Reported(
        tokens_done=request.tokens_done,
        bytes_done=request.bytes_done,
        cpu_s=request.cpu_s,
        step_s=request.step_s,
    )


def _progress_cpu_s(task: TaskRow, lease: Lease) -> float:
    """Return the CPU seconds that were reported when tokens or bytes rose last.

    The first heartbeat of a task counts as such a moment: its process may be old.
    """
    if task.progress_cpu_s is None or lease.progress_at != task.progress_at:
        return lease.reported.cpu_s
    return task.progress_cpu_s


def _usual_step_s(
    connection: Connection, task: TaskRow, worker: WorkerRow
) -> float | None:
    """Return how long a step of this task should take; None for an unmeasured worker.

    What a worker says that it computed counts up to the time from claim to acceptance.
    """
    if worker.tokens_per_s is None:
        return None
    terms = msgspec.json.decode(task.lease_terms_json or "", type=Task)
    step_tokens = min(terms.batch_size * terms.seq_len, task.num_tokens)
    recent = rounds.recent_seconds(
        connection,
        task.run_id,
        worker.worker_id,
        newest=leases.NUM_RECENT_TASKS,
    )
    token_s = [
        min(compute_s, total_s) / tokens for tokens, compute_s, total_s in recent
    ]
    return leases.measured_step_s(token_s, step_tokens=step_tokens) or sizing.step_s(
        # Nothing of it was accepted yet: it was measured by heartbeats, when late.
        worker.tokens_per_s,
        batch_tokens=step_tokens,
    )
