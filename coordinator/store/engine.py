"""The database: one writer thread, which alone checkpoints, and a few readers.

Every write runs on that one thread inside BEGIN IMMEDIATE, so that no two writes
ever wait for each other inside SQLite. Those that wait for the thread share the next
commit, each in a savepoint of its own: a disk that takes 10 ms for a commit would let
a hundred heartbeats a second wait for each other. Reads run beside it on connections
that cannot write. The event loop only ever awaits.
"""

from __future__ import annotations

import asyncio
import sqlite3
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import EXIT_DAMAGED, RefusedError, StartError

try:
    # Newer than the SQLite of many systems, whose WAL reset can corrupt a file.
    from pysqlite3 import dbapi2 as _driver  # type: ignore[import-untyped]
except ImportError:
    _driver = sqlite3

T = TypeVar("T")

NUM_READERS: Final = 2
BUSY_TIMEOUT_S: Final = 5.0
#: Writes that share a commit, at most: each waits for all of them.
MOST_TOGETHER: Final = 50
_ONE: Final = "one_of_many"
#: Primary result codes of SQLite: CORRUPT and NOTADB.
_DAMAGED: Final = frozenset({11, 26})
#: PERM, BUSY, READONLY, IOERR, FULL and CANTOPEN.
_UNUSABLE: Final = frozenset({3, 5, 8, 10, 13, 14})
#: FULL, and IOERR_SHMSIZE: no room for the index of the write-ahead log.
_FULL: Final = frozenset({13, 10 | 19 << 8})
#: Bytes that the write-ahead log is cut back to after a checkpoint.
JOURNAL_LIMIT_BYTES: Final = 64 * 2**20


def sqlite_module() -> types.ModuleType:
    """Return the driver in use; its `sqlite_version` goes to the log."""
    module: types.ModuleType = _driver
    return module


def _pragmas(read_only: bool) -> tuple[str, ...]:
    common = (
        "PRAGMA foreign_keys=ON",
        "PRAGMA trusted_schema=OFF",
        f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_S * 1000)}",
    )
    if read_only:
        return (*common, "PRAGMA query_only=ON", "PRAGMA wal_autocheckpoint=0")
    return (
        *common,
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",
        f"PRAGMA journal_size_limit={JOURNAL_LIMIT_BYTES}",
    )


def open_engine(path: Path, *, read_only: bool = False) -> Engine:
    """Return an engine on a SQLite file with the settings of this project."""
    mode = "ro" if read_only else "rwc"

    # Not through a URL of SQLAlchemy: it would decode the name of the file once more.
    def connect() -> Any:
        return _driver.connect(
            f"file:{quote(str(path))}?mode={mode}",
            uri=True,
            check_same_thread=False,
            timeout=BUSY_TIMEOUT_S,
        )

    engine = create_engine(
        "sqlite+pysqlite://",
        module=_driver,
        creator=connect,
        poolclass=QueuePool,
        pool_size=NUM_READERS if read_only else 1,
        max_overflow=0,
    )

    def configure(connection: Any, _record: Any) -> None:
        # The driver must not begin transactions on its own: ours say IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in _pragmas(read_only):
            cursor.execute(pragma)
        cursor.close()

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", begin)
    return engine


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says of a file that it cannot use into one StartError."""
    try:
        yield
    except DBAPIError as error:
        # The low byte is the primary code; the rest only refines it.
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            raise StartError(
                f"{path} is damaged ({error.orig}): restore it from a backup",
                exit_code=EXIT_DAMAGED,
            ) from error
        if code in _UNUSABLE:
            raise StartError(f"cannot use {path}: {error.orig}") from error
        raise


@contextmanager
def _room() -> Iterator[None]:
    """Turn what SQLite says of a full disk into a RefusedError `disk_low`."""
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", 0) not in _FULL:
            raise
        raise RefusedError(
            ErrorCode.DISK_LOW,
            f"the data folder has no room for this: {error.orig}",
            retry_after_s=30.0,
        ) from error


def read_once(path: Path, act: Callable[[Connection], T]) -> T:
    """Run `act` on a database that another process may be writing. Blocking.

    Raises StartError for a file that SQLite cannot use.
    """
    engine = open_engine(path, read_only=True)
    try:
        with clear_errors(path), engine.begin() as connection:
            return act(connection)
    finally:
        engine.dispose()


class _Write:
    """A function that changes rows, and who waits for what comes of it."""

    def __init__(self, act: Callable[[Connection], Any], outcome: Future[Any]) -> None:
        self._act = act
        self.outcome = outcome
        self.failed: BaseException | None = None
        self._found: Any = None

    def run(self, connection: Connection, *, is_alone: bool) -> None:
        """Run it; where it raises, what others did in this transaction stays.

        Raises only what ends the transaction for all.
        """
        if is_alone:
            self._found = self._act(connection)
            return
        connection.exec_driver_sql(f"SAVEPOINT {_ONE}")
        try:
            with _room():
                self._found = self._act(connection)
        except BaseException as error:
            try:
                connection.exec_driver_sql(f"ROLLBACK TO {_ONE}")
            except DBAPIError:  # SQLite has taken the whole transaction back
                raise error from None
            self.failed = error
        connection.exec_driver_sql(f"RELEASE {_ONE}")

    def tell(self) -> None:
        """Say what came of it, once that is durable or undone."""
        if self.failed is not None:
            self.outcome.set_exception(self.failed)
        else:
            self.outcome.set_result(self._found)


class Store:
    """Runs functions of a `Connection` on the writer or on a reader.

    Where the disk is full they raise RefusedError `disk_low`.
    """

    def __init__(self, path: Path) -> None:
        self._writer = open_engine(path)
        self._reader = open_engine(path, read_only=True)
        self._waiting: deque[_Write] = deque()
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._read_threads = ThreadPoolExecutor(
            NUM_READERS, thread_name_prefix="store-read"
        )

    async def write(self, act: Callable[[Connection], T]) -> T:
        """Run `act` in a transaction, committed and durable when this returns.

        What it changes is there whole or, where it raises, not at all.
        """
        return await asyncio.wrap_future(self._to_write(act))

    async def read(self, act: Callable[[Connection], T]) -> T:
        """Run `act` on one consistent snapshot; it cannot write."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._read_threads, self._in_reader, act)

    def write_now(self, act: Callable[[Connection], T]) -> T:
        """Do the same as `write`, blocking: for start-up and commands."""
        return self._to_write(act).result()

    def read_now(self, act: Callable[[Connection], T]) -> T:
        """Do the same as `read`, blocking: for start-up and commands."""
        return self._read_threads.submit(self._in_reader, act).result()

    def _to_write(self, act: Callable[[Connection], T]) -> Future[T]:
        """Let `act` wait for the writer thread."""
        outcome: Future[T] = Future()
        self._waiting.append(_Write(act, outcome))
        self._write_thread.submit(self._write_together)
        return outcome

    def _write_together(self) -> None:
        """Run what waits in one transaction; nothing where an earlier call did."""
        waiting = [
            self._waiting.popleft()
            for _ in range(min(len(self._waiting), MOST_TOGETHER))
        ]
        writes = [one for one in waiting if one.outcome.set_running_or_notify_cancel()]
        if not writes:
            return
        try:
            with _room(), self._writer.begin() as connection:
                for one in writes:
                    one.run(connection, is_alone=len(writes) == 1)
        except BaseException as error:
            # None of them is durable.
            for one in writes:
                one.failed = one.failed or error
        for one in writes:
            one.tell()

    def _in_reader(self, act: Callable[[Connection], T]) -> T:
        with _room(), self._reader.begin() as connection:
            return act(connection)

    def close(self) -> None:
        """Finish what runs, checkpoint, and close every connection."""
        try:
            self._write_thread.submit(self._checkpoint).result()
        finally:
            self._write_thread.shutdown()
            self._read_threads.shutdown()
            self._reader.dispose()
            self._writer.dispose()

    def _checkpoint(self) -> None:
        with self._writer.connect() as connection:
            raw = connection.connection.cursor()
            # Without room for it nothing is lost: whoever opens the file next reads
            # what is left in the log.
            with suppress(_driver.OperationalError):
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            raw.close()
