"""Ternary health of scored versions."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select

from coordinator.store.rows import HealthRow, typed
from coordinator.store.tables import evaluations, ternary_health, versions


def next_to_examine(connection: Connection, run_id: str) -> int | None:
    """Return the oldest scored version of a run that has blobs and no health yet."""
    return connection.execute(
        select(versions.c.version)
        .join(evaluations, evaluations.c.version == versions.c.version)
        .outerjoin(ternary_health, ternary_health.c.version == versions.c.version)
        .where(
            versions.c.run_id == run_id,
            versions.c.pruned.is_(False),
            ternary_health.c.version.is_(None),
        )
        .order_by(versions.c.version)
        .limit(1)
    ).scalar_one_or_none()


def scored_before(connection: Connection, run_id: str, version: int) -> int | None:
    """Return the newest scored version before one, where it still has its blobs."""
    row = connection.execute(
        select(versions.c.version, versions.c.pruned)
        .join(evaluations, evaluations.c.version == versions.c.version)
        .where(versions.c.run_id == run_id, versions.c.version < version)
        .order_by(versions.c.version.desc())
        .limit(1)
    ).first()
    return None if row is None or row.pruned else int(row.version)


def add_health(connection: Connection, **columns: Any) -> None:
    """Insert the health of a version."""
    connection.execute(insert(ternary_health).values(**columns))


def newest_health(connection: Connection, run_id: str, limit: int) -> list[HealthRow]:
    """Return the last rows of a run that say anything, newest first."""
    rows = connection.execute(
        select(ternary_health)
        .where(
            ternary_health.c.run_id == run_id, ternary_health.c.matrices_json != "[]"
        )
        .order_by(ternary_health.c.version.desc())
        .limit(limit)
    )
    return [typed(HealthRow, row) for row in rows]


def newest_examined(connection: Connection, run_id: str) -> int | None:
    """Return the newest version of a run that has a row, None before the first."""
    return connection.execute(
        select(ternary_health.c.version)
        .where(ternary_health.c.run_id == run_id)
        .order_by(ternary_health.c.version.desc())
        .limit(1)
    ).scalar_one_or_none()
