"""Tasks and their leases; a change of state is one statement that checks the old."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, and_, bindparam, func, insert, or_, select, update

from bitnet_ext.wire.verdicts import TaskKind, TaskState
from coordinator.store.rows import TaskRow, typed
from coordinator.store.tables import tasks, versions

#: Statements that each claim or heartbeat needs are made once: that takes as long as to
#: run them.
_ONE: Final = select(tasks).where(tasks.c.task_id == bindparam("of_task"))
_OF_CLAIM: Final = select(tasks).where(
    tasks.c.lease_claim_id == bindparam("of_claim"),
    tasks.c.state == TaskState.LEASED,
)
_HELD_BY: Final = select(tasks).where(
    tasks.c.lease_worker_id == bindparam("of_worker"),
    tasks.c.state == TaskState.LEASED,
)
_PENDING: Final = (
    select(tasks)
    .where(
        tasks.c.state == TaskState.PENDING,
        tasks.c.run_id == bindparam("of_run"),
        tasks.c.kind == bindparam("of_kind"),
        tasks.c.not_before_at <= bindparam("now"),
        or_(
            tasks.c.returned_round_id.is_(None),
            tasks.c.returned_round_id != bindparam("of_round"),
        ),
    )
    .order_by(tasks.c.epoch, tasks.c.created_at, tasks.c.task_id)
    .limit(bindparam("most"))
)
_ADD: Final = insert(tasks)
_RENEW: Final = update(tasks).where(
    tasks.c.task_id == bindparam("of_task"), tasks.c.state == TaskState.LEASED
)
_OVERDUE: Final = (
    select(tasks)
    .where(
        tasks.c.state == TaskState.LEASED,
        or_(
            tasks.c.expires_at <= bindparam("now"),
            tasks.c.hard_at <= bindparam("now"),
        ),
    )
    .order_by(tasks.c.expires_at, tasks.c.task_id)
)
#: The columns of a lease, all empty again once it has ended.
_NO_LEASE: Final[dict[str, Any]] = {
    "lease_hash": None,
    "lease_claim_id": None,
    "lease_worker_id": None,
    "lease_terms_json": None,
    "base_version": None,
    "round_id": None,
    "claimed_at": None,
    "expires_at": None,
    "hard_at": None,
    "predicted_s": None,
    "progress_at": None,
    "stalled_at": None,
    "progress_cpu_s": None,
}


def add_task(connection: Connection, **columns: Any) -> None:
    """Insert a pending task."""
    connection.execute(_ADD, {"state": TaskState.PENDING, **columns})


def add_failed(connection: Connection, **columns: Any) -> None:
    """Insert a task that is given up before anybody could claim it."""
    connection.execute(insert(tasks).values(state=TaskState.FAILED, **columns))


def find_task(connection: Connection, task_id: str) -> TaskRow | None:
    """Return a task by its id."""
    row = connection.execute(_ONE, {"of_task": task_id}).first()
    return None if row is None else typed(TaskRow, row)


def next_pending(
    connection: Connection,
    *,
    run_id: str,
    kind: TaskKind,
    now: float,
    round_id: int | None = None,
) -> TaskRow | None:
    """Return the pending task to claim next, or None."""
    found = all_pending(
        connection, run_id=run_id, kind=kind, now=now, round_id=round_id, limit=1
    )
    return found[0] if found else None


def all_pending(
    connection: Connection,
    *,
    run_id: str,
    kind: TaskKind,
    now: float,
    round_id: int | None,
    limit: int,
) -> list[TaskRow]:
    """Return the pending tasks to claim, the one to claim next first.

    Work that came back in round `round_id` waits for the next one.
    """
    rows = connection.execute(
        _PENDING,
        {
            "of_run": run_id,
            "of_kind": kind,
            "now": now,
            "of_round": round_id or 0,
            "most": limit,
        },
    )
    return [typed(TaskRow, row) for row in rows]


def lease_task(connection: Connection, task_id: str, **lease: Any) -> None:
    """Give a pending task to a worker; `lease` holds the columns of the lease."""
    done = connection.execute(
        update(tasks)
        .where(tasks.c.task_id == task_id, tasks.c.state == TaskState.PENDING)
        .values(
            state=TaskState.LEASED,
            attempt=tasks.c.attempt + 1,
            num_leases=tasks.c.num_leases + 1,
            reason=None,
            tokens_done=0,
            bytes_done=0,
            cpu_s=0.0,
            step_s=0.0,
            paused_s=0.0,
            returned_round_id=None,
            **lease,
        )
    )
    if done.rowcount != 1:
        raise LookupError(f"task {task_id} is not pending")


def shorten_task(connection: Connection, task_id: str, num_tokens: int) -> None:
    """Keep only the head of a task."""
    connection.execute(
        update(tasks).where(tasks.c.task_id == task_id).values(num_tokens=num_tokens)
    )


def leased_by_claim(connection: Connection, claim_id: str) -> TaskRow | None:
    """Return the live task of a claim that is being repeated."""
    row = connection.execute(_OF_CLAIM, {"of_claim": claim_id}).first()
    return None if row is None else typed(TaskRow, row)


def leased_to(connection: Connection, worker_id: str) -> list[TaskRow]:
    """Return the tasks that a worker holds."""
    rows = connection.execute(_HELD_BY, {"of_worker": worker_id})
    return [typed(TaskRow, row) for row in rows]


def all_leased(connection: Connection, run_id: str | None = None) -> list[TaskRow]:
    """Return every leased task, of one run or of all."""
    query = select(tasks).where(tasks.c.state == TaskState.LEASED)
    if run_id is not None:
        query = query.where(tasks.c.run_id == run_id)
    return [typed(TaskRow, row) for row in connection.execute(query)]


def overdue(connection: Connection, now: float) -> list[TaskRow]:
    """Return the leased tasks whose lease has run out, oldest first."""
    rows = connection.execute(_OVERDUE, {"now": now})
    return [typed(TaskRow, row) for row in rows]


def renew_lease(connection: Connection, task_id: str, **columns: Any) -> None:
    """Set columns of a live lease."""
    connection.execute(_RENEW, {"of_task": task_id, **columns})


def finish_task(connection: Connection, task_id: str, now: float) -> None:
    """Mark a leased task done and end its lease."""
    _leave(connection, task_id, state=TaskState.DONE, done_at=now)


def finish_late(connection: Connection, task_id: str, now: float) -> None:
    """Mark a pending task done: its result has come after its lease had ended."""
    done = connection.execute(
        update(tasks)
        .where(tasks.c.task_id == task_id, tasks.c.state == TaskState.PENDING)
        .values(state=TaskState.DONE, done_at=now)
    )
    if done.rowcount != 1:
        raise LookupError(f"task {task_id} is not pending")


def return_task(
    connection: Connection,
    task_id: str,
    *,
    attempt: int,
    reason: str,
    not_before_at: float,
    round_id: int | None,
) -> None:
    """Put a leased task back to pending."""
    _leave(
        connection,
        task_id,
        state=TaskState.PENDING,
        attempt=attempt,
        reason=reason,
        not_before_at=not_before_at,
        returned_round_id=round_id,
        tokens_done=0,
    )


def fail_task(connection: Connection, task_id: str, *, reason: str, now: float) -> None:
    """Give a leased task up."""
    _leave(connection, task_id, state=TaskState.FAILED, reason=reason, done_at=now)


def fail_beyond(
    connection: Connection,
    run_id: str,
    *,
    shard_id: str,
    end: int,
    reason: str,
    now: float,
) -> int:
    """Give up pending tasks whose stretch goes beyond `end`; return how many."""
    done = connection.execute(
        update(tasks)
        .where(
            tasks.c.run_id == run_id,
            tasks.c.state == TaskState.PENDING,
            tasks.c.shard_id == shard_id,
            tasks.c.start_token + tasks.c.num_tokens > end,
        )
        .values(state=TaskState.FAILED, reason=reason, done_at=now)
    )
    return done.rowcount


def _leave(connection: Connection, task_id: str, **columns: Any) -> None:
    done = connection.execute(
        update(tasks)
        .where(tasks.c.task_id == task_id, tasks.c.state == TaskState.LEASED)
        .values(**_NO_LEASE | columns)
    )
    if done.rowcount != 1:
        raise LookupError(f"task {task_id} is not leased")


def forgive_returns(connection: Connection, round_id: int) -> None:
    """Let work that came back in a round be claimed in that same round again."""
    connection.execute(
        update(tasks)
        .where(tasks.c.returned_round_id == round_id)
        .values(returned_round_id=None)
    )


def count_unfinished(connection: Connection, run_id: str, kind: TaskKind) -> int:
    """Return how many tasks of a kind are pending or leased."""
    return int(
        connection.execute(
            select(func.count()).where(
                tasks.c.run_id == run_id,
                tasks.c.kind == kind,
                tasks.c.state.in_([TaskState.PENDING, TaskState.LEASED]),
            )
        ).scalar_one()
    )


def leased_tokens(connection: Connection, run_id: str) -> int:
    """Return the tokens of all training tasks of a run that are out."""
    return int(
        connection.execute(
            select(func.coalesce(func.sum(tasks.c.num_tokens), 0)).where(
                tasks.c.run_id == run_id,
                tasks.c.kind == TaskKind.TRAIN,
                tasks.c.state == TaskState.LEASED,
            )
        ).scalar_one()
    )


def count_leased_in_round(connection: Connection, round_id: int) -> int:
    """Return how many training tasks of a round are still out."""
    return int(
        connection.execute(
            select(func.count()).where(
                tasks.c.round_id == round_id,
                tasks.c.kind == TaskKind.TRAIN,
                tasks.c.state == TaskState.LEASED,
            )
        ).scalar_one()
    )


def latest_failed(connection: Connection, run_id: str, limit: int) -> list[TaskRow]:
    """Return the tasks that were given up last, newest first."""
    rows = connection.execute(
        select(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.state == TaskState.FAILED)
        .order_by(tasks.c.done_at.desc(), tasks.c.task_id)
        .limit(limit)
    )
    return [typed(TaskRow, row) for row in rows]


def requeue_failed(connection: Connection, run_id: str, task_id: str | None) -> int:
    """Make failed tasks pending, as if never tried; return how many.

    `task_id` None: all of a run. Versions without blobs can't be scored any more.
    """
    pruned = select(versions.c.version).where(versions.c.pruned)
    query = update(tasks).where(
        tasks.c.run_id == run_id,
        tasks.c.state == TaskState.FAILED,
        or_(tasks.c.version.is_(None), tasks.c.version.not_in(pruned)),
    )
    if task_id is not None:
        query = query.where(tasks.c.task_id == task_id)
    done = connection.execute(
        query.values(
            state=TaskState.PENDING,
            attempt=0,
            reason=None,
            done_at=None,
            not_before_at=0.0,
            returned_round_id=None,
        )
    )
    return done.rowcount


def evaluation_of(connection: Connection, run_id: str, version: int) -> TaskRow | None:
    """Return the task that scores a version, whatever its state."""
    row = connection.execute(
        select(tasks)
        .where(
            tasks.c.run_id == run_id,
            tasks.c.kind == TaskKind.EVALUATE,
            tasks.c.version == version,
        )
        .order_by(tasks.c.created_at.desc())
    ).first()
    return None if row is None else typed(TaskRow, row)


def count_not_done(connection: Connection, run_id: str) -> dict[str, int]:
    """Return how many training tasks of a run are in each state but `done`.

    Of those there are ever more, and the page asks each second: a run counts them.
    """
    states = [state for state in TaskState if state is not TaskState.DONE]
    rows = connection.execute(
        select(tasks.c.state, func.count())
        .where(
            tasks.c.run_id == run_id,
            tasks.c.state.in_(states),
            tasks.c.kind == TaskKind.TRAIN,
        )
        .group_by(tasks.c.state)
    )
    return {str(state): 0 for state in states} | {state: count for state, count in rows}


def evaluations_open(connection: Connection, run_id: str) -> set[int]:
    """Return the versions whose evaluation is pending or leased."""
    rows = connection.execute(
        select(tasks.c.version).where(
            tasks.c.run_id == run_id,
            tasks.c.kind == TaskKind.EVALUATE,
            tasks.c.state.in_([TaskState.PENDING, TaskState.LEASED]),
        )
    )
    return {version for (version,) in rows}


def cancel_unfinished(
    connection: Connection, run_id: str, *, reason: str, now: float
) -> None:
    """Fail everything of a run that has not been done, leases included."""
    connection.execute(
        update(tasks)
        .where(
            and_(
                tasks.c.run_id == run_id,
                tasks.c.state.in_([TaskState.PENDING, TaskState.LEASED]),
            )
        )
        .values(**_NO_LEASE, state=TaskState.FAILED, reason=reason, done_at=now)
    )
