"""One coordinator for one data folder: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from coordinator.domain.errors import StartError

LOCK_NAME: Final = ".lock"


class DataLock:
    """Holds `flock` on `data/.lock` until it is closed or the process ends."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        self._descriptor = os.open(folder / LOCK_NAME, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise StartError(
                f"{folder} is in use by another coordinator or command"
            ) from error

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._descriptor)
