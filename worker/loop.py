"""The life of a worker: register, calibrate, then claim a task, do it, claim the next.

    register, calibrate -> claim -> fetch -> train -> submit -> claim ...
            ^                |
            +----------------+ it does not know us, or trains another run

Whatever happens to one task, the loop goes on: the work is dropped, failed or
given back, and the story is in the log. It ends when it is told to stop, or when
only an operator can help.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from bitnet_ext.layout import ModelShape
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import ClaimRequest, FailRequest, ReleaseRequest
from bitnet_ext.wire.verdicts import FailCode, WorkerPhase
from worker.calibrate import Calibration
from worker.client import IDLE_S, NoWork
from worker.errors import (
    CoordinatorError,
    LeaseLostError,
    ProtocolError,
    RefusedError,
    SettingsError,
    StoppedError,
    TaskError,
)
from worker.heartbeat import MIN_INTERVAL_S, Lease
from worker.registration import Run, read_run, refusal, register_request
from worker.train import Hooks
from worker.work import Kit, Work

log = logging.getLogger(__name__)

#: The least wait after a task that failed here. Full jitter comes on top, doubling
#: with each failure in a row: a broken worker must not burn every task's attempts.
TROUBLE_S: Final = 5.0
_MESSAGE_CHARS: Final = 2000


class Worker:
    """One worker. `on_registered` is called once, when the coordinator knows it."""

    def __init__(self, kit: Kit, on_registered: Callable[[], None]) -> None:
        self._kit = kit
        self._work = Work(kit)
        self._on_registered: Callable[[], None] | None = on_registered
        #: None: register before the next claim.
        self._run: Run | None = None
        #: The model that was timed last, and what came of it.
        self._timed: ModelShape | None = None
        self._calibration: Calibration | None = None
        #: Tries in a row that came to nothing.
        self._num_troubles = 0

    def run(self) -> None:
        """Work until told to stop.

        Raises SettingsError when only another configuration of this worker helps,
        CoordinatorError when the answer to a registration makes no sense.
        """
        try:
            while True:
                self.turn()
        except StoppedError as error:
            self._kit.heartbeat.phase = WorkerPhase.STOPPING
            log.info("stopped: %s", error, extra={"event": "worker.stopped"})

    def turn(self) -> None:
        """Claim once; do the task, or wait when there is none."""
        self._kit.shutdown.check()
        if self._run is None:
            self._enrol()
        if self._kit.heartbeat.draining:
            self._wait(IDLE_S)
            return
        try:
            claimed = self._claim()
        except (RefusedError, ProtocolError) as error:
            log.warning("no claim: %s", error, extra={"event": "claim.refused"})
            self._run = None
            self._num_troubles += 1
            self._back_off()
            return
        if isinstance(claimed, NoWork):
            self._wait(claimed.retry_after_s)
        else:
            self._hold(claimed)

    def _enrol(self) -> Run:
        """Register, however long that takes; time a model that was not timed yet.

        With the speed known the worker registers again, so that the coordinator
        can size its first task.
        """
        kit = self._kit
        kit.heartbeat.phase = WorkerPhase.STARTING
        run = self._register()
        while run.shape != self._timed:
            self._calibrate(run)
            run = self._register()
        self._run = run
        kit.heartbeat.phase = WorkerPhase.IDLE
        return run

    def _calibrate(self, run: Run) -> None:
        kit = self._kit
        kit.heartbeat.phase = WorkerPhase.CALIBRATING
        hooks = replace(
            Hooks.quiet(kit.clock),
            progress=lambda _tokens, _seconds: kit.heartbeat.light(),
            check=kit.shutdown.check,
        )
        found = kit.trainer.calibrate(run.shape, run.batch_size, run.optimiser, hooks)
        self._timed, self._calibration = run.shape, found
        kit.heartbeat.light()
        log.info(
            "tuned: %s",
            found,
            extra={
                "event": "worker.tuned",
                "isa": found.setup.variant,
                "threads": found.setup.threads,
                "tokens_per_s": round(found.tokens_per_s, 1),
            },
        )

    def _register(self) -> Run:
        settings = self._kit.settings
        request = register_request(settings, self._calibration)
        try:
            answer = self._kit.retry.until_answered(
                partial(self._kit.client.register, request), self._kit.shutdown.check
            )
        except RefusedError as error:
            raise refusal(error, settings.coordinator_url) from error
        run = read_run(answer, settings.preset)
        self._kit.heartbeat.interval_s = max(run.heartbeat_s, MIN_INTERVAL_S)
        log.info(
            "registered for run %s, preset %s",
            run.run_id,
            answer.preset,
            extra={
                "event": "worker.registered",
                "run_id": run.run_id,
                "preset": answer.preset,
            },
        )
        if self._on_registered is not None:
            self._on_registered()
            self._on_registered = None
        return run

    def _claim(self) -> Lease | NoWork:
        """Ask for a task; tries again with the same claim get the same lease."""
        kit = self._kit
        request = ClaimRequest(
            protocol_version=PROTOCOL_VERSION,
            worker_id=kit.settings.worker_id,
            claim_id=kit.new_id(),
        )

        def ask() -> Lease | NoWork:
            asked_at_s = kit.clock()
            answer = kit.client.claim(request)
            if isinstance(answer, NoWork):
                return answer
            return Lease(answer, asked_at_s, kit.clock)

        return kit.retry.until_answered(ask, kit.shutdown.check)

    def _hold(self, lease: Lease) -> None:
        """Do one task; whatever becomes of it, the coordinator hears of it."""
        heartbeat = self._kit.heartbeat
        heartbeat.lease = lease
        try:
            self._try(lease)
        except (StoppedError, SettingsError) as error:
            heartbeat.phase = WorkerPhase.STOPPING
            self._release(lease, str(error))
            raise
        finally:
            heartbeat.lease = None
        heartbeat.phase = WorkerPhase.IDLE
        self._back_off()

    def _try(self, lease: Lease) -> None:
        """Do one task; only what ends the worker is raised."""
        try:
            self._do(lease)
        except LeaseLostError as error:
            _log_task(lease, "lease.lost", f"work dropped: {error}")
        except CoordinatorError as error:
            _log_task(lease, "work.refused", f"work dropped: {error}")
            self._num_troubles += 1
            self._release(lease, str(error))
        except TaskError as error:
            _log_task(lease, "task.failed", f"cannot do this task: {error}", error.code)
            self._num_troubles += 1
            self._fail(lease, error.code, str(error))
        except (StoppedError, SettingsError):
            raise
        except Exception as error:
            code = _fail_code(error)
            log.exception(
                "task failed unexpectedly",
                extra={
                    "event": "task.failed",
                    "task_id": lease.task.task_id,
                    "code": code,
                },
            )
            self._num_troubles += 1
            self._fail(lease, code, f"{type(error).__name__}: {error}")
        else:
            self._num_troubles = 0

    def _do(self, lease: Lease) -> None:
        task = lease.task
        log.info(
            "claimed %s task %s",
            task.kind,
            task.task_id,
            extra={
                "event": "task.claimed",
                "task_id": task.task_id,
                "kind": task.kind,
                "base_version": task.base_version,
                "shard_id": task.shard_id,
            },
        )
        run = self._run
        if run is None or run.run_id != task.run_id:
            # A new run has begun, mostly with another model: learn which.
            run = self._enrol()
        if run.run_id != task.run_id:
            raise ProtocolError(
                f"task {task.task_id} is of run {task.run_id}, "
                f"/register names run {run.run_id}"
            )
        self._work.do(lease, run)

    def _fail(self, lease: Lease, code: FailCode, message: str) -> None:
        request = FailRequest(
            worker_id=self._kit.settings.worker_id,
            lease_id=lease.task.lease_id,
            code=code,
            message=message[:_MESSAGE_CHARS],
        )
        self._tell(lease, partial(self._kit.client.fail, lease.task.task_id, request))
        if code is FailCode.BAD_WEIGHTS:
            # Perhaps they are right, and what we know of the model is not.
            self._run = None

    def _release(self, lease: Lease, reason: str) -> None:
        request = ReleaseRequest(
            worker_id=self._kit.settings.worker_id,
            lease_id=lease.task.lease_id,
            reason=reason[:_MESSAGE_CHARS],
        )
        self._tell(
            lease, partial(self._kit.client.release, lease.task.task_id, request)
        )

    def _tell(self, lease: Lease, send: Callable[[], object]) -> None:
        """Say what became of a task, as long as that is of use to anybody."""

        def check() -> None:
            lease.check()
            self._kit.shutdown.check_fits(0.0)

        try:
            self._kit.retry.until_answered(send, check)
        except (CoordinatorError, StoppedError) as error:
            _log_task(lease, "task.untold", f"the lease will run out: {error}")

    def _wait(self, seconds: float) -> None:
        self._kit.retry.pause(seconds, self._kit.shutdown.check)

    def _back_off(self) -> None:
        """Wait after trouble, the longer the more often it came in a row."""
        if self._num_troubles:
            jitter_s = self._kit.retry.delay_s(self._num_troubles)
            self._wait(TROUBLE_S + jitter_s)


def _log_task(
    lease: Lease, event: str, message: str, code: FailCode | None = None
) -> None:
    extra = {"event": event, "task_id": lease.task.task_id}
    if code is not None:
        extra["code"] = code
    log.warning("%s", message, extra=extra)


def _fail_code(error: Exception) -> FailCode:
    """Return what an unexpected error is to the coordinator."""
    # torch has no class of its own for memory of the CPU.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return FailCode.OUT_OF_MEMORY
    return FailCode.WORKER_ERROR
