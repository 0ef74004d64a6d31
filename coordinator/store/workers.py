"""Registered workers, their logs, and the events of the fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from bitnet_ext.wire.verdicts import TaskState, WorkerPhase
from coordinator.store.rows import EventRow, WorkerRow, typed
from coordinator.store.tables import (
    events,
    facts,
    secrets,
    tasks,
    worker_logs,
    workers,
)

#: How many log records and events are kept; the oldest go first.
MAX_LOGS: Final = 20_000
MAX_EVENTS: Final = 20_000
#: Made once, as each request of a worker asks for them.
_ONE: Final = select(workers).where(workers.c.worker_id == bindparam("of_worker"))
_CHANGE: Final = update(workers).where(workers.c.worker_id == bindparam("of_worker"))
_MEAN_SPEED: Final = select(func.avg(workers.c.tokens_per_s)).where(
    workers.c.gone_at.is_(None), workers.c.phase != WorkerPhase.STOPPING
)


def find_worker(connection: Connection, worker_id: str) -> WorkerRow | None:
    """Return a worker by its id."""
    row = connection.execute(_ONE, {"of_worker": worker_id}).first()
    return None if row is None else typed(WorkerRow, row)


def all_workers(connection: Connection) -> list[WorkerRow]:
    """Return every worker, by name."""
    rows = connection.execute(select(workers).order_by(workers.c.name))
    return [typed(WorkerRow, row) for row in rows]


def add_worker(connection: Connection, **columns: Any) -> None:
    """Insert a worker."""
    connection.execute(insert(workers).values(**columns))


def change_worker(connection: Connection, worker_id: str, **columns: Any) -> None:
    """Set columns of a worker."""
    connection.execute(_CHANGE, {"of_worker": worker_id, **columns})


def count_task(connection: Connection, worker_id: str, *, tokens: int) -> None:
    """Count one accepted training task of a worker."""
    connection.execute(
        update(workers)
        .where(workers.c.worker_id == worker_id)
        .values(
            tasks_done=workers.c.tasks_done + 1,
            tokens_accepted=workers.c.tokens_accepted + tokens,
        )
    )


def count_failure(connection: Connection, worker_id: str) -> None:
    """Count one task that a worker lost or could not do."""
    connection.execute(
        update(workers)
        .where(workers.c.worker_id == worker_id)
        .values(tasks_failed=workers.c.tasks_failed + 1)
    )


def forget_speeds(connection: Connection) -> None:
    """Count every worker as never measured: another model takes another time."""
    connection.execute(
        update(workers).values(tokens_per_s=None, spread=None, duration_ratio=None)
    )


def fleet_speed(connection: Connection) -> float | None:
    """Return the mean measured tokens per second of a worker, None before any.

    Without those that were put away or have stopped.
    """
    mean = connection.execute(_MEAN_SPEED).scalar_one()
    return None if mean is None else float(mean)


def add_logs(connection: Connection, records: Iterable[Mapping[str, Any]]) -> None:
    """Insert log records and let the oldest beyond the limit go."""
    rows = [dict(record) for record in records]
    if not rows:
        return
    connection.execute(insert(worker_logs), rows)
    newest = connection.execute(select(func.max(worker_logs.c.log_id))).scalar_one()
    connection.execute(
        delete(worker_logs).where(worker_logs.c.log_id <= newest - MAX_LOGS)
    )


def add_event(
    connection: Connection, *, at: float, kind: str, body: Mapping[str, Any]
) -> None:
    """Record that something happened."""
    done = connection.execute(
        insert(events).values(
            at=at, kind=kind, body_json=msgspec.json.encode(body).decode()
        )
    )
    (newest,) = done.inserted_primary_key or (0,)
    if newest % 1000 == 0:
        connection.execute(
            delete(events).where(events.c.event_id <= newest - MAX_EVENTS)
        )


def newest_events(connection: Connection, limit: int) -> list[EventRow]:
    """Return what happened last, in order."""
    rows = connection.execute(
        select(events).order_by(events.c.event_id.desc()).limit(limit)
    )
    return [typed(EventRow, row) for row in reversed(rows.all())]


def fact(connection: Connection, name: str) -> str | None:
    """Return a small fact of this installation."""
    return connection.execute(
        select(facts.c.value).where(facts.c.name == name)
    ).scalar_one_or_none()


def set_fact(connection: Connection, name: str, value: str) -> None:
    """Remember a small fact."""
    done = connection.execute(
        update(facts).where(facts.c.name == name).values(value=value)
    )
    if done.rowcount == 0:
        connection.execute(insert(facts).values(name=name, value=value))


def server_secret(connection: Connection, fresh: bytes) -> bytes:
    """Return the secret that lease ids are made with; `fresh` becomes it once."""
    found = connection.execute(
        select(secrets.c.value).where(secrets.c.name == "server_secret")
    ).scalar_one_or_none()
    if found is not None:
        return bytes.fromhex(found)
    connection.execute(insert(secrets).values(name="server_secret", value=fresh.hex()))
    return fresh


def longest_silent(connection: Connection, *, before: float) -> str | None:
    """Return the worker to forget first of those unheard of since `before`.

    Who never had a task accepted goes first, then who has been silent longest; None
    where nobody is silent or all of them hold tasks.
    """
    holders = select(tasks.c.lease_worker_id).where(
        tasks.c.state == TaskState.LEASED, tasks.c.lease_worker_id.is_not(None)
    )
    return connection.execute(
        select(workers.c.worker_id)
        .where(workers.c.heartbeat_at <= before, workers.c.worker_id.not_in(holders))
        .order_by(workers.c.tasks_done > 0, workers.c.heartbeat_at, workers.c.worker_id)
        .limit(1)
    ).scalar_one_or_none()


def remove_worker(connection: Connection, worker_id: str) -> None:
    """Delete a worker; what it did stays under its id."""
    connection.execute(delete(workers).where(workers.c.worker_id == worker_id))


def count_workers(connection: Connection) -> int:
    """Return how many workers have registered."""
    return int(
        connection.execute(select(func.count()).select_from(workers)).scalar_one()
    )
