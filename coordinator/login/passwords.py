"""The admin password: argon2id hashes, made and checked off the event loop."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from sqlalchemy import Connection

from coordinator.domain.seams import Rng
from coordinator.store.sessions import (
    Database,
    end_all_sessions,
    find_password_hash,
    keep_password_hash,
)

#: Longer ones are refused unread, so that nobody can make us hash megabytes.
MAX_PASSWORD_CHARS: Final = 1024
_NEW_PASSWORD_BYTES: Final = 15
#: Passwords that wait to be checked at one time, from all addresses together.
MAX_WAITING: Final = 16

_hasher: Final = PasswordHasher()


def hash_password(password: str) -> str:
    """Return the argon2id hash, with its salt and cost in the same text."""
    return _hasher.hash(password)


def password_matches(password_hash: str, password: str) -> bool:
    """Tell whether a password belongs to a hash. Slow on purpose.

    Raises argon2.exceptions.InvalidHashError when the hash is none.
    """
    if len(password) > MAX_PASSWORD_CHARS:
        return False
    try:
        return _hasher.verify(password_hash, password)
    except VerifyMismatchError:
        return False


def new_password(rng: Rng) -> str:
    """Return a random password of 120 bits, in groups that can be typed."""
    letters = base64.b32encode(rng.token(_NEW_PASSWORD_BYTES)).decode().lower()
    return "-".join(letters[i : i + 6] for i in range(0, len(letters), 6))


class BusyError(Exception):
    """Too many passwords wait to be checked."""


class PasswordChecker:
    """Checks passwords one after another on a thread of its own.

    One check takes 64 MiB and all cores for a moment; a flood of them must not
    add up.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="password")
        self._num_waiting = 0

    async def is_right(self, password: str) -> bool:
        """Tell whether this is the admin password; False while there is none.

        Raises BusyError, and checks nothing, while `MAX_WAITING` others wait.
        """
        if self._num_waiting >= MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} passwords wait to be checked")
        self._num_waiting += 1
        try:
            return await self._check(password)
        finally:
            self._num_waiting -= 1

    async def _check(self, password: str) -> bool:
        stored = await self._db.read(find_password_hash)
        if stored is None:
            return False
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, password_matches, stored, password
        )


async def ensure_admin_password(db: Database, rng: Rng) -> str | None:
    """Make the first password and return it; None when there is one already.

    The caller shows it once: nothing but its hash is stored.
    """
    if await db.read(find_password_hash) is not None:
        return None
    password = new_password(rng)
    password_hash = await asyncio.to_thread(hash_password, password)
    await db.write(lambda connection: keep_password_hash(connection, password_hash))
    return password


def reset_admin_password(connection: Connection, new: str) -> None:
    """Set the password and end every session. Slow: for the command line.

    Raises ValueError for one that is empty or longer than can ever be entered.
    """
    if not 0 < len(new) <= MAX_PASSWORD_CHARS:
        raise ValueError(
            f"password must have 1 to {MAX_PASSWORD_CHARS} characters, got {len(new)}"
        )
    keep_password_hash(connection, hash_password(new))
    end_all_sessions(connection)
