"""Sends this worker's log to the coordinator, from a thread of its own.

Training never waits for it: the queue is bounded, the oldest records go first
when it is full, and how many went is said in the next batch.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from functools import partial
from typing import Final

from bitnet_ext.wire.messages import ID_PATTERN, LogRecord, LogsRequest
from worker.client import Client
from worker.errors import CoordinatorError, StoppedError
from worker.retry import Retry

QUEUE_RECORDS: Final = 1000
BATCH_RECORDS: Final = 200
EVERY_S: Final = 2.0
_MESSAGE_CHARS: Final = 8000
_EVENT_CHARS: Final = 100
# Levels of the wire, highest first; a level in between counts as the one below.
_LEVELS: Final = (
    (logging.CRITICAL, "critical"),
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
)


class LogShipper(logging.Handler):
    """A handler whose records end up in `POST /logs`, between `start` and `stop`."""

    def __init__(
        self,
        client: Client,
        worker_id: str,
        retry: Retry,
        *,
        queue_records: int = QUEUE_RECORDS,
    ) -> None:
        super().__init__()
        self._client = client
        self._worker_id = worker_id
        self._retry = retry
        self._queue_records = queue_records
        self._waiting: deque[LogRecord] = deque()
        self._num_dropped = 0
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logship", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Send what is left, once, and wait for that at most `timeout_s`."""
        self._stopping.set()
        if self._thread.is_alive():  # never started where nobody knew this worker
            self._thread.join(timeout_s)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record; waits for no network and drops the oldest when full."""
        # What this thread itself logs about sending would breed more to send.
        if threading.current_thread() is self._thread:
            return
        shipped = _shipped(record)
        with self._guard:
            if len(self._waiting) >= self._queue_records:
                self._waiting.popleft()
                self._num_dropped += 1
            self._waiting.append(shipped)

    def flush_waiting(self) -> None:
        """Send everything queued, batch by batch, for as long as that takes."""
        while batch := self._take():
            request = LogsRequest(worker_id=self._worker_id, records=batch)
            try:
                self._retry.until_answered(
                    partial(self._client.logs, request), self._check
                )
            except StoppedError:
                self._put_back(batch)
                return
            except CoordinatorError:
                # Refused: the same lines stand on standard error.
                self._count_dropped(len(batch))
                return

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self.flush_waiting()
        self._send_rest()

    def _send_rest(self) -> None:
        """Send what is left; without an answer it is gone."""
        try:
            while batch := self._take():
                self._client.logs(LogsRequest(worker_id=self._worker_id, records=batch))
        except CoordinatorError:
            return

    def _check(self) -> None:
        if self._stopping.is_set():
            raise StoppedError("the log shipper stops")

    def _take(self) -> list[LogRecord]:
        """Return the next batch, led by how many records were dropped before it."""
        with self._guard:
            dropped, self._num_dropped = self._num_dropped, 0
            size = min(len(self._waiting), BATCH_RECORDS - 1)
            batch = [self._waiting.popleft() for _ in range(size)]
        if dropped:
            batch.insert(0, _drop_notice(dropped))
        return batch

    def _put_back(self, batch: list[LogRecord]) -> None:
        with self._guard:
            self._waiting.extendleft(reversed(batch))

    def _count_dropped(self, num_records: int) -> None:
        with self._guard:
            self._num_dropped += num_records


def _drop_notice(num_records: int) -> LogRecord:
    return LogRecord(
        at=time.time(),
        level="warning",
        event="log.dropped",
        message=f"{num_records} log records were dropped",
    )


def _shipped(record: logging.LogRecord) -> LogRecord:
    """Return what the wire holds of a record."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    task_id = str(getattr(record, "task_id", ""))
    return LogRecord(
        at=record.created,
        level=next(
            (name for least, name in _LEVELS if record.levelno >= least), "debug"
        ),
        event=str(getattr(record, "event", ""))[:_EVENT_CHARS],
        message=message[:_MESSAGE_CHARS],
        task_id=task_id if re.fullmatch(ID_PATTERN, task_id) else None,
    )
