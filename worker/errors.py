"""The errors of the worker.

WorkerError
├── SettingsError         a setting or argument is wrong; it ends with status 2
├── StoppedError          told to stop; what is held is given back
├── TaskError             this task cannot be done here; told to the coordinator
│   ├── BadDownloadError  bytes arrived that are not the ones asked for
│   ├── BadShardError     a stretch of tokens fails its checks
│   └── BadWeightsError   a weight version fails its checks
└── CoordinatorError      what became of one request
    ├── RetryLaterError   no answer, or "not now"
    ├── ProtocolError     an answer that this protocol does not have
    └── RefusedError      no, with a code
        └── LeaseLostError   the task is not ours any more; drop the work
"""

from __future__ import annotations

from bitnet_ext.wire.verdicts import ErrorCode, FailCode


class WorkerError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(WorkerError):
    """A setting, an argument or its file is missing or wrong; the message names it."""


class StoppedError(WorkerError):
    """The worker was told to stop and cannot finish in time."""


class TaskError(WorkerError):
    """The task cannot be done; `code` goes to the coordinator with the message."""

    code = FailCode.WORKER_ERROR

    def __init__(self, message: str, code: FailCode | None = None) -> None:
        super().__init__(message)
        self.code = code or self.code


class BadDownloadError(TaskError):
    """Bytes arrived that are not the ones asked for."""


class BadShardError(TaskError):
    """A stretch of a shard has the wrong type, length, hash or token ids."""

    code = FailCode.BAD_SHARD


class BadWeightsError(TaskError):
    """A weight version has the wrong hash, layout or numbers."""

    code = FailCode.BAD_WEIGHTS


class CoordinatorError(WorkerError):
    """A request to the coordinator did not succeed."""


class RetryLaterError(CoordinatorError):
    """No answer, or one that says "not now"; the same request may be sent again."""

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, progressed: bool = False
    ) -> None:
        super().__init__(message)
        #: What the coordinator asked for, 0 where it said nothing.
        self.retry_after_s = retry_after_s
        #: True where a part of the body arrived: patience starts anew.
        self.progressed = progressed


class ProtocolError(CoordinatorError):
    """The other side does not speak this protocol; trying again cannot help."""


class RefusedError(CoordinatorError):
    """The coordinator refused, and says why."""

    def __init__(
        self, code: ErrorCode, message: str, *, field: str | None = None
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.field = field


class LeaseLostError(RefusedError):
    """The lease ran out or was taken away: nothing of this task counts any more."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.LEASE_LOST, message)
