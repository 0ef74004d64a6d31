"""What the outside world looks like to the coordinator: clock, randomness, files.

Everything that could differ between two runs of the same story comes in through
these, so that a test can tell the story its own way.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol


class Clock(Protocol):
    """Time, three ways. All in seconds."""

    def now(self) -> float:
        """Return the lease clock, Unix seconds; it never goes back."""

    def wall(self) -> float:
        """Return the wall clock, Unix seconds; sessions and keys go by it."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment of this process."""


class Rng(Protocol):
    """Randomness."""

    def token(self, num_bytes: int) -> bytes:
        """Return unguessable bytes."""

    def uniform(self, low: float, high: float) -> float:
        """Return a number between `low` and `high`."""


class NewFile(Protocol):
    """A file being written; nobody sees it before it is renamed."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`. Raises OSError."""

    def sync(self) -> None:
        """Make what was written survive a power cut. Raises OSError."""

    def close(self) -> None:
        """Close. Raises OSError."""


class Fs(Protocol):
    """The calls on which durability depends, one by one."""

    def create(self, path: Path) -> NewFile:
        """Make a new file, mode 0600. Raises FileExistsError."""

    def open(self, path: Path) -> BinaryIO:
        """Open for reading, never through a link. Raises FileNotFoundError."""

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically within one file system."""

    def unlink(self, path: Path) -> None:
        """Remove a file; a missing one is no error."""

    def sync_folder(self, folder: Path) -> None:
        """Make renames and unlinks within `folder` survive a power cut."""

    def free_bytes(self, folder: Path) -> int:
        """Return the space left where `folder` is."""
