"""Tells the coordinator how far the work is, and learns whether it still counts.

- a Lease knows its own end: `lease_s` after the moment *before* the request that
  granted or renewed it was sent, by this machine's monotonic clock
- the beacon file is touched when work gets on, never because a thread is alive
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bitnet_ext.wire.messages import MAX_HEARTBEAT_S, HeartbeatRequest, Task
from bitnet_ext.wire.verdicts import LeaseState, WorkerPhase
from worker.client import Client
from worker.errors import CoordinatorError, LeaseLostError

log = logging.getLogger(__name__)

FIRST_INTERVAL_S: Final = 5.0
#: Whatever the coordinator says, a worker neither floods it nor falls silent.
MIN_INTERVAL_S: Final = 0.1


#: A task whose rest takes less than this share of `stop_after_s` is finished: nobody
#: wants the crumb.
CRUMB_SHARE: Final = 0.25


def is_out_of_time(elapsed_s: float, left_s: float, stop_after_s: float | None) -> bool:
    """Return whether a task is to be handed in as it is; its rest takes `left_s`."""
    if stop_after_s is None or elapsed_s < stop_after_s:
        return False
    return left_s > CRUMB_SHARE * stop_after_s


class Lease:
    """The right to one task and how far it is. The work itself writes progress."""

    def __init__(
        self, task: Task, asked_at_s: float, clock: Callable[[], float]
    ) -> None:
        self.task = task
        #: Tokens trained or scored, bytes down and up, seconds of the latest step.
        self.tokens_done = 0
        self.bytes_done = 0
        self.step_s = 0.0
        self._clock = clock
        self._asked_at_s = asked_at_s
        self._deadline_s = asked_at_s + task.lease_s
        self._lost = threading.Event()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task was asked for."""
        return self._clock() - self._asked_at_s

    @property
    def lost(self) -> bool:
        """True once the coordinator said so, or nothing renewed it in time."""
        return self.denied or self.expired

    @property
    def denied(self) -> bool:
        """True once the coordinator said that the lease is lost."""
        return self._lost.is_set()

    @property
    def expired(self) -> bool:
        """True once nothing renewed it in time."""
        return self._clock() >= self._deadline_s

    def check(self) -> None:
        """Raise LeaseLostError once the lease is lost."""
        if self.lost:
            raise LeaseLostError(f"task {self.task.task_id} is not ours any more")

    def renew(self, sent_at_s: float, lease_s: float) -> None:
        """Move the end on; an answer that was overtaken never moves it back."""
        self._deadline_s = max(self._deadline_s, sent_at_s + lease_s)

    def lose(self) -> None:
        """Take note that the task is somebody else's, or nobody's."""
        self._lost.set()

    def took_bytes(self, num_bytes: int) -> None:
        """Count bytes moved, down or up."""
        self.bytes_done += num_bytes

    def took_step(self, tokens_done: int, step_s: float) -> None:
        """Note the tokens done so far and the wall seconds of the last step."""
        self.tokens_done = tokens_done
        self.step_s = step_s


class Heartbeat:
    """Beats in its own thread between `start` and `stop`."""

    def __init__(
        self,
        client: Client,
        worker_id: str,
        beacon: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        #: What the worker does right now; the loop sets it.
        self.phase = WorkerPhase.STARTING
        #: The task held, if any; the loop sets it.
        self.lease: Lease | None = None
        #: True while the operator wants this worker to take no work.
        self.draining = False
        #: Seconds between two beats; each answer may change it.
        self.interval_s = FIRST_INTERVAL_S
        self._client = client
        self._worker_id = worker_id
        self._beacon = beacon
        self._clock = clock
        self._cpu_s = cpu_s
        self._seen: tuple[Lease | None, int, int] = (None, 0, 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start beating."""
        self._thread.start()

    def stop(self, wait_s: float = 0.0) -> None:
        """Stop; wait so long at most for the answer that is on its way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _run(self) -> None:
        while not self._stopping.wait(self.interval_s):
            try:
                self.beat()
            except Exception:
                # Without this thread every later lease would run out.
                log.exception(
                    "a heartbeat failed", extra={"event": "heartbeat.crashed"}
                )

    def beat(self) -> None:
        """Send one heartbeat; where there is no answer, the next one tries again."""
        lease = self.lease
        sent_at_s = self._clock()
        answered = False
        try:
            answer = self._client.heartbeat(self._request(lease))
        except CoordinatorError as error:
            log.warning(
                "heartbeat failed: %s", error, extra={"event": "heartbeat.failed"}
            )
        else:
            answered = True
            self.draining = answer.drain
            wished_s = min(answer.heartbeat_s, MAX_HEARTBEAT_S)
            self.interval_s = max(wished_s, MIN_INTERVAL_S)
            if lease is not None and answer.lease is LeaseState.HELD:
                lease.renew(sent_at_s, answer.lease_s)
            elif lease is not None:
                lease.lose()
        self._follow(lease, answered=answered)

    def light(self) -> None:
        """Touch the beacon: work got on."""
        try:
            self._beacon.touch()
        except OSError as error:
            log.warning(
                "cannot touch the beacon: %s", error, extra={"event": "beacon.failed"}
            )

    def _request(self, lease: Lease | None) -> HeartbeatRequest:
        if lease is None:
            return HeartbeatRequest(
                worker_id=self._worker_id, phase=self.phase, cpu_s=self._cpu_s()
            )
        return HeartbeatRequest(
            worker_id=self._worker_id,
            phase=self.phase,
            task_id=lease.task.task_id,
            lease_id=lease.task.lease_id,
            tokens_done=lease.tokens_done,
            bytes_done=lease.bytes_done,
            cpu_s=self._cpu_s(),
            step_s=lease.step_s,
        )

    def _follow(self, lease: Lease | None, *, answered: bool) -> None:
        """Touch the beacon when the work got on, or there is none to get on with."""
        _, tokens_before, bytes_before = self._seen
        if lease is None:
            self._seen = (None, 0, 0)
            alive = answered and self.phase is WorkerPhase.IDLE
        else:
            if self._seen[0] is not lease:
                tokens_before, bytes_before = 0, 0
            self._seen = (lease, lease.tokens_done, lease.bytes_done)
            alive = self._seen[1] > tokens_before or self._seen[2] > bytes_before
        if alive:
            self.light()
