"""What is known of each worker, and what to make of it: facts from rows, a verdict."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import Verdict, WorkerPhase
from coordinator.domain import leases
from coordinator.domain.verdicts import WorkerFacts, verdict
from coordinator.service.fleet import Fleet
from coordinator.service.roster import heartbeat_s
from coordinator.store import tasks
from coordinator.store.rows import TaskRow, WorkerRow


def facts_of(
    worker: WorkerRow,
    task: TaskRow | None,
    *,
    back_in_round: bool,
    interval_s: float,
    now: float,
) -> WorkerFacts:
    """Return all that a verdict on a worker is drawn from; `task` is what it holds."""
    without = WorkerFacts(
        heartbeat_age_s=max(0.0, now - worker.heartbeat_at),
        heartbeat_s=interval_s,
        tokens_done=None,
        num_tokens=None,
        no_progress_s=0.0,
        elapsed_s=0.0,
        predicted_s=None,
        progress_age_s=None,
        cpu_s_since_progress=None,
        lease_lost_s=_age_s(worker.lease_lost_at, now),
        back_in_round=back_in_round,
        quarantine=worker.quarantine_reason,
        draining=worker.draining,
        is_gone=worker.gone_at is not None,
        has_stopped=worker.phase == WorkerPhase.STOPPING
        and worker.lease_lost_at is None,
    )
    return without if task is None else _with_task(without, worker, task, now)


def _with_task(
    facts: WorkerFacts, worker: WorkerRow, task: TaskRow, now: float
) -> WorkerFacts:
    """Return the facts of a worker that holds a task, from those without it."""
    return replace(
        facts,
        tokens_done=task.tokens_done,
        num_tokens=task.num_tokens,
        no_progress_s=leases.no_progress_s(
            task.stalled_at, heartbeat_at=worker.heartbeat_at
        ),
        # Without a coordinator `now` is when its clock was stored last: maybe earlier.
        elapsed_s=max(0.0, now - (task.claimed_at or now) - task.paused_s),
        predicted_s=task.predicted_s,
        progress_age_s=max(0.0, now - (task.progress_at or now)),
        cpu_s_since_progress=_cpu_s_since_progress(task),
        lease_lost_s=None,
        has_stopped=False,
    )


def _age_s(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, now - at)


def _cpu_s_since_progress(task: TaskRow) -> float | None:
    if task.progress_cpu_s is None:
        return None
    return task.cpu_s - task.progress_cpu_s


def assess(
    connection: Connection, fleet: Fleet, worker: WorkerRow, now: float
) -> tuple[Verdict, str]:
    """Return the verdict on one worker and its evidence, but for waiting: idle."""
    held = tasks.leased_to(connection, worker.worker_id)
    return verdict(
        facts_of(
            worker,
            held[0] if held else None,
            back_in_round=False,
            interval_s=heartbeat_s(fleet, worker),
            now=now,
        )
    )
