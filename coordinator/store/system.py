"""The real clock, randomness and files behind `coordinator.domain.seams`."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class LeaseClock:
    """A clock that never goes back, not even over a restart.

    now() = max(wall clock at start, highest time ever stored) + monotonic elapsed.
    A jump of the wall clock while running changes nothing.
    """

    def __init__(
        self,
        high_water: float = 0.0,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._start = max(wall(), high_water)
        self._started = monotonic()

    def now(self) -> float:
        """Return the lease clock, Unix seconds."""
        return self._start + (self._monotonic() - self._started)

    def wall(self) -> float:
        """Return the wall clock, Unix seconds."""
        return self._wall()

    def monotonic(self) -> float:
        """Return seconds since some fixed moment of this process."""
        return self._monotonic()


class SystemRng:
    """Randomness of the operating system."""

    def __init__(self) -> None:
        self._jitter = random.SystemRandom()

    def token(self, num_bytes: int) -> bytes:
        """Return unguessable bytes."""
        return secrets.token_bytes(num_bytes)

    def uniform(self, low: float, high: float) -> float:
        """Return a number between `low` and `high`."""
        return self._jitter.uniform(low, high)


class OsFile:
    """A new file of the operating system."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`, however short the single writes are."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def sync(self) -> None:
        """Flush file data and size to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class OsFs:
    """The file system of the operating system."""

    def create(self, path: Path) -> OsFile:
        """Make a new file, mode 0600. Raises FileExistsError."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        return OsFile(os.open(path, flags, 0o600))

    def open(self, path: Path) -> BinaryIO:
        """Open for reading, never through a link. Raises FileNotFoundError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return os.fdopen(descriptor, "rb", buffering=0)

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically within one file system."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; a missing one is no error."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Make renames and unlinks within `folder` survive a power cut."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, folder: Path) -> int:
        """Return the space left where `folder` is."""
        return shutil.disk_usage(folder).free
