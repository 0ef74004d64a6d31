"""Hand-written stand-ins for the outside world: clock, randomness, files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from coordinator.domain.seams import NewFile
from coordinator.store.system import OsFs

#: When every story of a `FakeClock` begins, in Unix seconds.
START = 1_800_000_000.0


class FakeClock:
    """Stands still until it is told to go on."""

    def __init__(self, start: float = START) -> None:
        self._start = start
        self._now = start

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def now(self) -> float:
        """Return the lease clock."""
        return self._now

    def wall(self) -> float:
        """Return the wall clock, here the same."""
        return self._now

    def monotonic(self) -> float:
        """Return seconds since the start."""
        return self._now - self._start


class FakeRng:
    """Counts instead of guessing: every token is new, and the same in every run."""

    def __init__(self, salt: int = 0) -> None:
        self._count = 0
        self._salt = salt
        #: Where between `low` and `high` the next numbers lie.
        self.share = 0.5

    def token(self, num_bytes: int) -> bytes:
        """Return a token that was not returned before."""
        self._count += 1
        number = (self._salt << 24) + self._count
        return number.to_bytes(max(num_bytes, 4), "big")[-num_bytes:]

    def uniform(self, low: float, high: float) -> float:
        """Return the number at `share`."""
        return low + self.share * (high - low)


class MadeToFailError(OSError):
    """The failure that a test has ordered."""

    def __init__(self, call: str, path: Path, code: int = errno.EIO) -> None:
        super().__init__(code, f"made to fail: {call}", str(path))


class FakeFs:
    """The real file system whose n-th durability call can be made to fail.

    A call that fails does nothing, except that a write leaves half of its data. With
    `failing` it fails once; with `crashing` all later calls fail as well, as if the
    process had ended there.
    """

    def __init__(self) -> None:
        self._real = OsFs()
        self._fails_at: int | None = None
        self._for_good = False
        self._code = errno.EIO
        #: Every durability call so far, as `name`; a failed one included.
        self.calls: list[str] = []
        #: Bytes that the disk has left; None: those of the real one.
        self.free: int | None = None

    @contextmanager
    def failing(self, ordinal: int, code: int = errno.EIO) -> Iterator[None]:
        """Fail at the `ordinal`-th call from now (1: the next), within the block."""
        self._fails_at, self._for_good = len(self.calls) + ordinal, False
        self._code = code
        try:
            yield
        finally:
            self._fails_at = None

    @contextmanager
    def crashing(self, ordinal: int) -> Iterator[None]:
        """Fail from the `ordinal`-th call from now on, within the block."""
        with self.failing(ordinal):
            self._for_good = True
            yield

    def must_fail(self, call: str) -> bool:
        """Count a call; return whether it has to fail."""
        self.calls.append(call)
        if self._fails_at is None or len(self.calls) < self._fails_at:
            return False
        return self._for_good or len(self.calls) == self._fails_at

    def create(self, path: Path) -> NewFile:
        """Make a new file, whose calls are counted too."""
        self._check("create", path)
        return _FakeFile(self, self._real.create(path), path)

    def open(self, path: Path) -> BinaryIO:
        """Open for reading; never fails on order."""
        return self._real.open(path)

    def rename(self, source: Path, target: Path) -> None:
        """Move."""
        self._check("rename", target)
        self._real.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove."""
        self._check("unlink", path)
        self._real.unlink(path)

    def sync_folder(self, folder: Path) -> None:
        """Sync a folder."""
        self._check("sync_folder", folder)
        self._real.sync_folder(folder)

    def free_bytes(self, folder: Path) -> int:
        """Return the space left."""
        return self._real.free_bytes(folder) if self.free is None else self.free

    def _check(self, call: str, path: Path) -> None:
        if self.must_fail(call):
            raise self.error(call, path)

    def error(self, call: str, path: Path) -> MadeToFailError:
        """Return the failure that was ordered."""
        return MadeToFailError(call, path, self._code)


class _FakeFile:
    """A new file of a `FakeFs`."""

    def __init__(self, fs: FakeFs, file: NewFile, path: Path) -> None:
        self._fs = fs
        self._file = file
        self._path = path

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._fs.must_fail("write"):
            self._file.write(memoryview(data)[: len(data) // 2])
            raise self._fs.error("write", self._path)
        self._file.write(data)

    def sync(self) -> None:
        if self._fs.must_fail("sync"):
            raise self._fs.error("sync", self._path)
        self._file.sync()

    def close(self) -> None:
        # Really closed in any case: no test may run out of descriptors.
        self._file.close()
        if self._fs.must_fail("close"):
            raise self._fs.error("close", self._path)


def unread_pipe() -> TextIO:
    """Return the end to write to of a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")
