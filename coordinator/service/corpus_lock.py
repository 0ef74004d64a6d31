"""A lock on the prepared corpus: it is not replaced under a coordinator that uses it.

It is a `flock` on the folder itself, so it needs no right to write there and dies with
its process. Coordinators share it; who replaces the folder needs it alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.domain.errors import StartError
from coordinator.service.documents import CorpusError

log = logging.getLogger(__name__)


class CorpusInUseError(CorpusError):
    """A coordinator or its run needs the prepared corpus, so it must stay."""


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep a prepared corpus from being replaced, where there is one.

    Raises StartError when it is just being replaced. A file system without locks
    gives none, which is logged.
    """
    descriptor = _open(folder)
    if descriptor is None:
        yield
        return
    try:
        _share(folder, descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Keep coordinators from beginning to use a prepared corpus, where there is one.

    Raises CorpusInUseError when one uses it.
    """
    descriptor = _open(folder)
    if descriptor is None:
        yield
        return
    try:
        _take(folder, descriptor)
        yield
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _take(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorpusInUseError(
            f"{folder} is in use by a coordinator: stop it first, or prepare another "
            "folder"
        ) from error


def _share(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return
    except (BlockingIOError, FileNotFoundError):
        pass  # being replaced, or it was between the opening and the lock
    except OSError as error:
        log.warning(
            "%s can't be locked (%s): don't prepare it anew while a run needs it",
            folder,
            error.strerror,
            extra={"event": "corpus.unlocked"},
        )
        return
    raise StartError(f"{folder} is being prepared anew: start again when it is done")
