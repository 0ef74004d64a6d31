"""How far the lease clock had come: as kept now and then, and by its stamps."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, func, select

from coordinator.store import workers
from coordinator.store.tables import claims, tasks
from coordinator.store.tables import workers as workers_table

_FACT: Final = "clock_high_water"
#: From these time is counted for workers, so none may lie ahead of the clock.
_STAMPS: Final = (
    workers_table.c.heartbeat_at,
    tasks.c.claimed_at,
    tasks.c.progress_at,
    claims.c.ended_at,
)


def keep(connection: Connection, now: float) -> None:
    """Store how far the lease clock has come, Unix seconds."""
    workers.set_fact(connection, _FACT, repr(now))


def ran_until(connection: Connection) -> float | None:
    """Return the highest moment of the lease clock that is known; None: it never ran.

    What was kept may be older than a lease: the clock would begin before its claim.
    """
    kept = workers.fact(connection, _FACT)
    stamps = [connection.scalar(select(func.max(column))) for column in _STAMPS]
    moments = [float(kept)] if kept is not None else []
    return max([*moments, *(s for s in stamps if s is not None)], default=None)
