"""The errors of the coordinator.

FleetError
├── RefusedError     a request cannot be done; goes to the caller with its code
└── StartError       the coordinator cannot start, or a command cannot run
"""

from __future__ import annotations

from typing import Final

from bitnet_ext.wire.verdicts import ErrorCode

#: Exit status where what is kept is damaged: only a backup helps.
EXIT_DAMAGED: Final = 4


class FleetError(Exception):
    """Base of every error that this package raises on purpose."""


class RefusedError(FleetError):
    """A request is refused and nothing has changed."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class StartError(FleetError):
    """The coordinator refuses to start; the message says what to do."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
