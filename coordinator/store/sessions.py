"""SQL for operators: browser sessions, and the hash of the admin password."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

from msgspec import Struct, convert
from sqlalchemy import Connection, delete, insert, or_, select, update

from coordinator.store.tables import secrets, sessions

T = TypeVar("T")

_PASSWORD: Final = "admin_password_hash"  # noqa: S105 - a name, not a password


class Database(Protocol):
    """The two ways to reach the tables, both from the event loop."""

    def write(self, act: Callable[[Connection], T], /) -> Awaitable[T]:
        """Run `act` in one transaction, durable when this returns."""

    def read(self, act: Callable[[Connection], T], /) -> Awaitable[T]:
        """Run `act` on one consistent snapshot."""


class SessionRow(Struct, frozen=True, kw_only=True):
    """A row of `sessions`. Times are Unix seconds by the wall clock."""

    session_hash: str
    operator: str
    created_at: float
    seen_at: float


def add_session(connection: Connection, row: SessionRow) -> None:
    """Keep a new session."""
    connection.execute(
        insert(sessions).values(
            session_hash=row.session_hash,
            operator=row.operator,
            created_at=row.created_at,
            seen_at=row.seen_at,
        )
    )


def find_session(connection: Connection, session_hash: str) -> SessionRow | None:
    """Return a session, expired or not; None when it was never begun or has ended."""
    row = connection.execute(
        select(sessions).where(sessions.c.session_hash == session_hash)
    ).one_or_none()
    return None if row is None else convert(row, SessionRow, from_attributes=True)


def touch_session(connection: Connection, session_hash: str, seen_at: float) -> None:
    """Note that a session was used; one that has ended stays ended."""
    connection.execute(
        update(sessions)
        .where(sessions.c.session_hash == session_hash)
        .values(seen_at=seen_at)
    )


def end_session(connection: Connection, session_hash: str) -> None:
    """Remove one session."""
    connection.execute(delete(sessions).where(sessions.c.session_hash == session_hash))


def end_all_sessions(connection: Connection) -> None:
    """Remove every session: everybody has to log in again."""
    connection.execute(delete(sessions))


def end_old_sessions(
    connection: Connection, *, created_before: float, seen_before: float
) -> None:
    """Remove the sessions that can never be used again."""
    connection.execute(
        delete(sessions).where(
            or_(
                sessions.c.created_at < created_before,
                sessions.c.seen_at < seen_before,
            )
        )
    )


def find_password_hash(connection: Connection) -> str | None:
    """Return the hash of the admin password; None before the first is made."""
    return connection.execute(
        select(secrets.c.value).where(secrets.c.name == _PASSWORD)
    ).scalar_one_or_none()


def keep_password_hash(connection: Connection, password_hash: str) -> None:
    """Set the hash of the admin password, in place of an older one."""
    connection.execute(delete(secrets).where(secrets.c.name == _PASSWORD))
    connection.execute(insert(secrets).values(name=_PASSWORD, value=password_hash))
