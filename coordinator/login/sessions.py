"""Sessions of operators: an opaque id in a cookie, of which we keep only a hash.

A session ends after eight idle hours, after seven days whatever happens, or at
logout. All by the wall clock, which is passed in.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from coordinator.domain.seams import Rng
from coordinator.store.sessions import (
    Database,
    SessionRow,
    add_session,
    end_old_sessions,
    end_session,
    find_session,
    touch_session,
)

IDLE_S: Final = 8 * 3600.0
ABSOLUTE_S: Final = 7 * 86400.0
#: Use is noted this often at most: not every request is worth a write.
TOUCH_S: Final = 60.0

_ID_BYTES: Final = 32
_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody who may see the pages."""

    name: str


def is_alive(row: SessionRow, at: float) -> bool:
    """Tell whether a session may still be used at a moment of the wall clock."""
    return at < row.seen_at + IDLE_S and at < row.created_at + ABSOLUTE_S


def needs_touch(row: SessionRow, at: float) -> bool:
    """Tell whether the last noted use is old enough to be worth a write."""
    return at >= row.seen_at + TOUCH_S


def session_hash(cookie: str) -> str:
    """Return what is stored of a session id; the id can't be found from it."""
    return hashlib.sha256(cookie.encode()).hexdigest()


async def begin_session(
    db: Database, operator: Operator, *, old_cookie: str | None, at: float, rng: Rng
) -> str:
    """Start a session under a new id and return the id for the cookie.

    Whatever session the browser brought along ends: an id that somebody planted
    before the login is worth nothing after it.
    """
    cookie = base64.urlsafe_b64encode(rng.token(_ID_BYTES)).rstrip(b"=").decode()
    row = SessionRow(
        session_hash=session_hash(cookie),
        operator=operator.name,
        created_at=at,
        seen_at=at,
    )

    def begin(connection: Connection) -> None:
        if old_cookie is not None:
            end_session(connection, session_hash(old_cookie))
        end_old_sessions(
            connection, created_before=at - ABSOLUTE_S, seen_before=at - IDLE_S
        )
        add_session(connection, row)

    await db.write(begin)
    return cookie


async def find_operator(
    db: Database, cookie: str | None, *, at: float, touch: bool
) -> Operator | None:
    """Return who holds a living session; `touch` notes the use, which keeps it."""
    if cookie is None or not _COOKIE.fullmatch(cookie):
        return None
    key = session_hash(cookie)
    row = await db.read(lambda connection: find_session(connection, key))
    if row is None or not is_alive(row, at):
        return None
    if touch and needs_touch(row, at):
        await db.write(lambda connection: touch_session(connection, key, at))
    return Operator(row.operator)


async def forget_session(db: Database, cookie: str | None) -> None:
    """End a session; one that does not exist is no error."""
    if cookie is not None:
        key = session_hash(cookie)
        await db.write(lambda connection: end_session(connection, key))
