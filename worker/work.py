"""One task: fetch weights and tokens, train or score, submit, learn from the answer.

The order of `Work._train` is a promise. Moments and residual are computed on the
side and committed last, once the coordinator said that the work is accepted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import Codec, PayloadError, encode_with_feedback
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.wire.messages import EvaluationRequest, SubmissionMeta, Task
from bitnet_ext.wire.verdicts import (
    FailCode,
    SubmissionState,
    TaskKind,
    WorkerPhase,
)
from worker.client import Client, Download, submission_body
from worker.errors import TaskError
from worker.heartbeat import Heartbeat, Lease, is_out_of_time
from worker.memory import Learned, Memory
from worker.order import TOKEN_BYTES
from worker.registration import Run
from worker.retry import Retry
from worker.settings import WorkerSettings
from worker.shards import TextCache
from worker.shelf import Shelf
from worker.shutdown import Shutdown
from worker.train import Hooks, TrainResult
from worker.trainer import Trainer
from worker.weights import Version, WeightCache

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Left of the grace period for giving a task back that could not be handed in.
GIVE_BACK_S: Final = 2.0
#: How often a result is sent after a heartbeat learnt that the lease is lost: what
#: answers heartbeats and never submissions will not change its mind.
TRIES_AFTER_LOSS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What a worker works with: all that a test replaces to tell another story."""

    settings: WorkerSettings
    client: Client
    heartbeat: Heartbeat
    trainer: Trainer
    shutdown: Shutdown
    retry: Retry
    #: Monotonic seconds, and CPU seconds of this process.
    clock: Callable[[], float]
    cpu_s: Callable[[], float]
    #: A fresh id, for claims and submissions.
    new_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class _Fetched:
    """The inputs of a task, and what it took to get them."""

    weights: NDArray[np.float32]
    tokens: NDArray[np.int32]
    download_s: float
    download_bytes: int


class Work:
    """Does tasks one after another; remembers weights, moments and residual."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        data = kit.settings.data
        shelf = Shelf(None if data is None else data / kit.settings.worker_id)
        self._memory = Memory(shelf)
        self._weights = WeightCache(self._fetch, shelf)
        self._text = TextCache(self._fetch)
        #: Seconds from the last local step to the answer, of the latest task.
        self._submit_s = 0.0
        self._lease: Lease | None = None

    def do(self, lease: Lease, run: Run) -> None:
        """Do the task of `lease`; returning means that it was accepted.

        Raises TaskError when it cannot be done here, LeaseLostError when it is
        not ours any more, StoppedError when it does not fit in the grace period,
        RefusedError when the coordinator does not want the result.
        """
        task = lease.task
        if task.synthetic and not self._kit.settings.allow_synthetic_shards:
            raise TaskError(
                f"shard {task.shard_id} is synthetic and "
                "BITNET_ALLOW_SYNTHETIC_SHARDS is not true",
                FailCode.SYNTHETIC_SHARD,
            )
        self._lease = lease
        try:
            match task.kind:
                case TaskKind.TRAIN:
                    self._train(lease, run)
                case TaskKind.EVALUATE:
                    self._evaluate(lease, run)
        finally:
            self._lease = None

    def _train(self, lease: Lease, run: Run) -> None:
        task, kit = lease.task, self._kit
        codec = _codec(task)
        cpu_before_s = kit.cpu_s()
        fetched = self._download(lease, run)
        known = self._memory.recall(run)
        kit.heartbeat.phase = WorkerPhase.TRAINING
        result = kit.trainer.train(
            run.shape,
            fetched.weights,
            known.moments if known else None,
            fetched.tokens,
            task,
            self._training_hooks(lease),
        )
        trained_at_s = kit.clock()
        kit.heartbeat.phase = WorkerPhase.UPLOADING
        frame, learned = _encode(result, codec, known, task, run)
        meta = self._meta(task, result, fetched, kit.cpu_s() - cpu_before_s)
        body = submission_body(meta, frame)
        answer = self._until_answered(
            lease, partial(kit.client.submit, body, lease.took_bytes)
        )
        if answer.state is not SubmissionState.FILTERED:
            self._memory.commit(run, learned)
        self._submit_s = kit.clock() - trained_at_s
        _log_submission(meta, answer.state)

    def _evaluate(self, lease: Lease, run: Run) -> None:
        task, kit = lease.task, self._kit
        fetched = self._download(lease, run)
        kit.heartbeat.phase = WorkerPhase.EVALUATING
        score = kit.trainer.evaluate(
            run.shape, fetched.weights, fetched.tokens, task, self._hooks(lease)
        )
        if not math.isfinite(score.nats):
            raise TaskError(
                f"version {task.base_version} scores {score.nats} nats",
                FailCode.NON_FINITE_LOSS,
            )
        kit.heartbeat.phase = WorkerPhase.UPLOADING
        request = EvaluationRequest(
            worker_id=kit.settings.worker_id,
            lease_id=task.lease_id,
            submission_id=kit.new_id(),
            version=task.base_version,
            nats=score.nats,
            tokens=score.tokens,
            bytes=task.text_bytes,
            compute_s=score.compute_s,
        )
        self._until_answered(lease, partial(kit.client.evaluate, task.task_id, request))
        log.info(
            "evaluation accepted: %.1f nats over %d tokens",
            score.nats,
            score.tokens,
            extra={
                "event": "evaluation.accepted",
                "task_id": task.task_id,
                "version": task.base_version,
                "tokens": score.tokens,
            },
        )

    def _download(self, lease: Lease, run: Run) -> _Fetched:
        task, kit = lease.task, self._kit
        kit.heartbeat.phase = WorkerPhase.DOWNLOADING
        started_s = kit.clock()
        wanted = Version(
            run.run_id, task.base_version, task.base_sha256, run.shape, task.broadcast
        )
        weights = self._weights.get(wanted, self._took_bytes)
        tokens = self._text.get(task, run.shape.vocab_size, self._took_bytes)
        return _Fetched(weights, tokens, kit.clock() - started_s, lease.bytes_done)

    def _fetch(self, download: Download) -> None:
        """Fill a download, however many tries that takes."""
        self._kit.retry.until_answered(
            partial(self._kit.client.continue_download, download),
            self._check_not_begun,
        )

    def _took_bytes(self, num_bytes: int) -> None:
        if self._lease is not None:
            self._lease.took_bytes(num_bytes)
        self._check_not_begun()

    def _check_not_begun(self) -> None:
        """Before the first step nobody knows how long the task takes: give it back."""
        if self._lease is not None:
            self._lease.check()
        self._kit.shutdown.check_fits(None)

    def _hooks(self, lease: Lease) -> Hooks:
        started_s = self._kit.clock()

        def check() -> None:
            lease.check()
            self._kit.shutdown.check_fits(self._left_s(lease, started_s))

        return replace(
            Hooks.quiet(self._kit.clock), progress=lease.took_step, check=check
        )

    def _training_hooks(self, lease: Lease) -> Hooks:
        """Return the hooks of a task that may be handed in after any of its steps."""
        started_s, task = self._kit.clock(), lease.task

        def check() -> None:
            lease.check()
            needed_s = self._submit_s if lease.tokens_done else None
            self._kit.shutdown.check_fits(needed_s)

        def enough() -> bool:
            left_s = self._left_s(lease, started_s)
            return (
                self._kit.heartbeat.draining
                or not self._kit.shutdown.fits(left_s)
                or is_out_of_time(lease.elapsed_s, left_s or 0.0, task.stop_after_s)
            )

        return Hooks(
            progress=lease.took_step, check=check, enough=enough, clock=self._kit.clock
        )

    def _left_s(self, lease: Lease, started_s: float) -> float | None:
        """Return how long the rest takes at the pace so far; None before a step."""
        if not lease.tokens_done:
            return None
        num_tokens = lease.task.byte_length // TOKEN_BYTES
        token_s = (self._kit.clock() - started_s) / lease.tokens_done
        return token_s * max(0, num_tokens - lease.tokens_done) + self._submit_s

    def _until_answered(self, lease: Lease, send: Callable[[], T]) -> T:
        """Send a result until the coordinator says what became of it.

        The lease decides before the first try only. Afterwards an answer may have
        been lost on its way: the work counts, and the lease ended with its task. So
        the same submission is sent again; it gets the answer that was stored.
        """
        lease.check()
        num_denied = 0

        def try_once() -> T:
            nonlocal num_denied
            num_denied += lease.denied
            if num_denied > TRIES_AFTER_LOSS:
                lease.check()
            return send()

        return self._kit.retry.until_answered(
            try_once, partial(self._kit.shutdown.check_fits, GIVE_BACK_S)
        )

    def _meta(
        self, task: Task, result: TrainResult, fetched: _Fetched, cpu_s: float
    ) -> SubmissionMeta:
        return SubmissionMeta(
            submission_id=self._kit.new_id(),
            task_id=task.task_id,
            lease_id=task.lease_id,
            worker_id=self._kit.settings.worker_id,
            base_version=task.base_version,
            num_steps=result.num_steps,
            tokens=result.tokens,
            loss_first=result.loss_first,
            loss_last=result.loss_last,
            loss_mean=result.loss_mean,
            compute_s=result.compute_s,
            download_s=fetched.download_s,
            download_bytes=fetched.download_bytes,
            cpu_s=max(0.0, cpu_s),
        )


def _codec(task: Task) -> Codec:
    """Return the codec that the task asks for, before anything is trained for it."""
    try:
        return Codec(task.codec)
    except ValueError:
        raise TaskError(
            f"codec must be one of {', '.join(Codec)}, got {task.codec!r}"
        ) from None


def _encode(
    result: TrainResult, codec: Codec, known: Learned | None, task: Task, run: Run
) -> tuple[bytes, Learned]:
    """Return the frame of a result, and what to remember once it is accepted."""
    try:
        payload, residual = encode_with_feedback(
            codec,
            result.pseudo_gradient,
            known.residual_for(task.round_kind) if known else None,
        )
    except PayloadError as error:
        raise TaskError(
            f"pseudo-gradient: {error}", FailCode.NON_FINITE_LOSS
        ) from error
    header = FrameHeader(
        kind=FrameKind(task.round_kind),
        codec=codec,
        layout_hash=run.layout_hash,
        version=task.base_version,
        num_elements=len(result.pseudo_gradient),
    )
    learned = Learned(result.moments, residual, task.round_kind)
    return encode_frame(header, payload), learned


def _log_submission(meta: SubmissionMeta, state: SubmissionState) -> None:
    log.info(
        "submission %s: %d tokens, loss %.4f to %.4f",
        state,
        meta.tokens,
        meta.loss_first,
        meta.loss_last,
        extra={
            "event": "submission.answered",
            "state": state,
            "task_id": meta.task_id,
            "submission_id": meta.submission_id,
            "base_version": meta.base_version,
            "tokens": meta.tokens,
            "loss": meta.loss_mean,
            "seconds": round(meta.compute_s, 3),
        },
    )
