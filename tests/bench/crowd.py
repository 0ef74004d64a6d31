"""Workers that do not train but speak as real ones do, hundreds in one process.

Each registers, waits for work, fetches links and text by the real protocol, sleeps
through its local steps at a speed of its own, sends heartbeats and logs meanwhile, and
hands in a real payload. What is measured here is the coordinator, so a payload is made
once, and what is downloaded is only counted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import num_params, shape_from_json
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import (
    ClaimRequest,
    ErrorBody,
    EvaluationRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    LogRecord,
    LogsRequest,
    Message,
    RegisterAnswer,
    RegisterRequest,
    SubmissionMeta,
    Task,
)
from bitnet_ext.wire.verdicts import LeaseState, TaskKind, WorkerPhase
from coordinator.domain.manifest import Manifest
from tests.bench.talk import Answer, Connection
from worker.heartbeat import is_out_of_time
from worker.logship import EVERY_S
from worker.order import TOKEN_BYTES, text_window
from worker.retry import Retry
from worker.shards import KEPT

M = TypeVar("M", bound=Message)

#: Tokens a second of the slowest and of the fastest worker, evenly by their logarithm.
SPEEDS: Final = (25.0, 100.0)
#: Two steps of one task differ by so much.
JITTER: Final = 0.05
#: So long the workers of a crowd take to arrive, in seconds.
ARRIVAL_S: Final = 5.0
#: Payloads that differ, and the share of noise that each has of its own.
NUM_PAYLOADS: Final = 8
NOISE: Final = 0.7
_BYTES: Final = "application/octet-stream"


@dataclass(slots=True)
class Heard:
    """What the coordinator answered, as its clients saw it; moments in Unix seconds."""

    #: Of training tasks: when the claim was sent and answered, and the base version.
    claims: list[tuple[float, float, int]] = field(default_factory=list)
    #: When it was sent, and seconds until the answer.
    heartbeats: list[tuple[float, float]] = field(default_factory=list)
    #: When training ended, and seconds from there to acceptance, all tries included.
    submissions: list[tuple[float, float]] = field(default_factory=list)
    #: Route and error code of each refusal, and broken connections.
    refusals: Counter[str] = field(default_factory=Counter)
    num_leases_lost: int = 0


class RefusedError(Exception):
    """An answer after which a worker drops its task."""


class Payloads:
    """The frames to hand in: a few that agree mostly, as honest ones do."""

    def __init__(self) -> None:
        self._payloads: dict[str, list[bytes]] = {}
        self._frames: dict[int, list[bytes]] = {}

    def frame(self, task: Task, run: RegisterAnswer, place: int) -> bytes:
        """Return a frame for a task; `place` chooses one of a few."""
        if task.base_version not in self._frames:
            self._frames = {task.base_version: self._make(task, run)}
        frames = self._frames[task.base_version]
        return frames[place % len(frames)]

    def _make(self, task: Task, run: RegisterAnswer) -> list[bytes]:
        size = num_params(shape_from_json(run.model))
        header = FrameHeader(
            kind=FrameKind(task.round_kind),
            codec=Codec(task.codec),
            layout_hash=bytes.fromhex(run.layout_hash),
            version=task.base_version,
            num_elements=size,
        )
        if task.codec not in self._payloads:
            self._payloads[task.codec] = _payloads(Codec(task.codec), size)
        return [encode_frame(header, one) for one in self._payloads[task.codec]]


def _payloads(codec: Codec, size: int) -> list[bytes]:
    rng = np.random.default_rng(7)

    def noise() -> np.ndarray[Any, np.dtype[np.float32]]:
        return 1e-4 * rng.standard_normal(size, dtype=np.float32)

    common = noise()
    return [
        encode(codec, (1.0 - NOISE) * common + NOISE * noise())
        for _ in range(NUM_PAYLOADS)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a crowd works."""

    port: int
    key: str
    manifest: Manifest


class CrowdWorker:
    """One worker, number `number` of `of`."""

    def __init__(
        self, place: Place, heard: Heard, payloads: Payloads, number: int, of: int
    ) -> None:
        self._place, self._heard, self._payloads = place, heard, payloads
        self._number = number
        self.worker_id = f"crowd-{number:04}"
        slowest, fastest = SPEEDS
        self._speed = slowest * (fastest / slowest) ** (number / max(of - 1, 1))
        self._rng = random.Random(number)
        self._retry = Retry(self._rng)
        # As the threads of a worker have: work, heartbeats, logs.
        key = {"X-Api-Key": place.key, "Accept-Encoding": "identity"}
        self._work, self._beat, self._ship = (
            Connection(place.port, **key) for _ in "wbl"
        )
        self._num_ids = 0
        self._phase = WorkerPhase.STARTING
        self._task: Task | None = None
        self._lost = False
        self._tokens_done = self._bytes_done = 0
        self._step_s = 0.0
        self._records: list[LogRecord] = []
        self._held: int | None = None
        self._windows: deque[tuple[str, int, int]] = deque(maxlen=KEPT)

    async def run(self) -> None:
        """Work until cancelled."""
        await asyncio.sleep(self._rng.uniform(0.0, ARRIVAL_S))
        await self._register(None)
        self._run = await self._register(self._speed)
        self._phase = WorkerPhase.IDLE
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_heartbeats())
                group.create_task(self._send_logs())
                group.create_task(self._do_tasks())
        finally:
            for connection in (self._work, self._beat, self._ship):
                connection.close()

    def _new_id(self) -> str:
        self._num_ids += 1
        return f"{self.worker_id}-{self._num_ids}"

    async def _register(self, tokens_per_s: float | None) -> RegisterAnswer:
        request = RegisterRequest(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self.worker_id,
            name=self.worker_id,
            package_version="0",
            cpu_model="one of a crowd",
            isa="none",
            threads=1,
            calibrated_tokens_per_s=tokens_per_s,
        )
        return await self._post(self._work, "/register", request, RegisterAnswer)

    async def _do_tasks(self) -> None:
        while True:
            task, asked_at = await self._claim()
            self._task, self._lost = task, False
            self._tokens_done = self._bytes_done = 0
            self._note("task.claimed", task)
            try:
                if task.kind is TaskKind.TRAIN:
                    await self._train(task, asked_at)
                else:
                    await self._evaluate(task)
            except RefusedError:
                continue  # it is counted; the lease runs out
            finally:
                self._task, self._phase = None, WorkerPhase.IDLE

    async def _claim(self) -> tuple[Task, float]:
        """Return the next task, and when it was asked for."""
        while True:
            request = ClaimRequest(
                protocol_version=PROTOCOL_VERSION,
                worker_id=self.worker_id,
                claim_id=self._new_id(),
            )
            asked_at = time.time()
            answer = await self._until_answered(self._work, "/work", _json(request))
            if answer.status == 204:
                await asyncio.sleep(float(answer.headers.get("retry-after", "0")))
                continue
            task = msgspec.json.decode(answer.body, type=Task)
            if task.kind is TaskKind.TRAIN:
                heard = (asked_at, time.time(), task.base_version)
                self._heard.claims.append(heard)
            return task, asked_at

    async def _train(self, task: Task, asked_at: float) -> None:
        began = time.time()
        await self._download(task)
        download_s = time.time() - began
        self._phase = WorkerPhase.TRAINING
        num_steps = await self._make_steps(task, asked_at)
        if self._lost:
            self._heard.num_leases_lost += 1
            return
        self._phase = WorkerPhase.UPLOADING
        ended_at = time.time()
        meta = SubmissionMeta(
            submission_id=self._new_id(),
            task_id=task.task_id,
            lease_id=task.lease_id,
            worker_id=self.worker_id,
            base_version=task.base_version,
            num_steps=num_steps,
            tokens=self._tokens_done,
            loss_first=5.0,
            loss_last=4.9,
            loss_mean=4.95,
            compute_s=ended_at - began - download_s,
            download_s=download_s,
            download_bytes=self._bytes_done,
            cpu_s=ended_at - began,
        )
        block = _json(meta)
        head = len(block).to_bytes(4, "little") + block
        frame = self._payloads.frame(task, self._run, self._number)
        await self._until_answered(self._work, "/gradient", head, frame, kind=_BYTES)
        self._heard.submissions.append((ended_at, time.time() - ended_at))
        self._note("submission.answered", task)

    async def _make_steps(self, task: Task, asked_at: float) -> int:
        """Sleep through the local steps; return how many were made before time was up.

        The rule is the one of a real worker.
        """
        num_tokens = task.byte_length // TOKEN_BYTES
        batch_tokens = task.batch_size * task.seq_len
        for step in range(1, task.num_steps + 1):
            self._step_s = batch_tokens / self._speed
            self._step_s *= self._rng.uniform(1.0 - JITTER, 1.0 + JITTER)
            await asyncio.sleep(self._step_s)
            self._tokens_done = min(num_tokens, step * batch_tokens)
            left_s = (num_tokens - self._tokens_done) / self._speed
            elapsed_s = time.time() - asked_at
            if self._lost or is_out_of_time(elapsed_s, left_s, task.stop_after_s):
                return step
        return task.num_steps

    async def _evaluate(self, task: Task) -> None:
        await self._download(task)
        self._phase = WorkerPhase.EVALUATING
        shard = self._place.manifest.held_out_shard()
        # Scoring is about three times as fast as training.
        compute_s = shard.num_tokens / (3.0 * self._speed)
        began = time.time()
        while time.time() - began < compute_s:
            await asyncio.sleep(min(1.0, compute_s))
            self._tokens_done = round(3.0 * self._speed * (time.time() - began))
        request = EvaluationRequest(
            worker_id=self.worker_id,
            lease_id=task.lease_id,
            submission_id=self._new_id(),
            version=task.base_version,
            nats=1.0 / task.base_version,
            tokens=shard.num_tokens - shard.num_documents,
            bytes=task.text_bytes,
            compute_s=compute_s,
        )
        path = f"/tasks/{task.task_id}/evaluation"
        await self._until_answered(self._work, path, _json(request))

    async def _download(self, task: Task) -> None:
        """Fetch what is not held: links or the whole version, and the text."""
        self._phase = WorkerPhase.DOWNLOADING
        version = task.base_version
        if version != self._held:
            since = "" if self._held is None else f"?from={self._held}"
            await self._fetch(f"/weights/{version}{since}")
            self._held = version
        first, end = text_window(task)
        window = (task.shard_id, first, end)
        if window not in self._windows:
            last = min(TOKEN_BYTES * (end + 1), task.shard_bytes) - 1
            stretch = f"Range: bytes={TOKEN_BYTES * first}-{last}\r\n"
            await self._fetch(f"/corpus/{task.shard_id}", more=stretch)
            self._windows.append(window)

    async def _fetch(self, path: str, more: str = "") -> None:
        answer = await self._until_answered(
            self._work, path, method="GET", more=more, count_only=True
        )
        self._bytes_done += answer.num_bytes

    async def _send_heartbeats(self) -> None:
        interval_s = self._run.heartbeat_s
        while True:
            await asyncio.sleep(interval_s)
            task, sent_at = self._task, time.time()
            request = HeartbeatRequest(
                worker_id=self.worker_id,
                phase=self._phase,
                task_id=task.task_id if task else None,
                lease_id=task.lease_id if task else None,
                tokens_done=self._tokens_done if task else 0,
                bytes_done=self._bytes_done if task else 0,
                cpu_s=time.monotonic(),
                step_s=self._step_s if task else 0.0,
            )
            answer = await self._post(
                self._beat, "/heartbeat", request, HeartbeatAnswer
            )
            self._heard.heartbeats.append((sent_at, time.time() - sent_at))
            interval_s = answer.heartbeat_s
            if task is self._task and answer.lease is LeaseState.LOST:
                self._lost = True

    async def _send_logs(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            records, self._records = self._records, []
            if records:
                request = LogsRequest(worker_id=self.worker_id, records=records)
                await self._until_answered(self._ship, "/logs", _json(request))

    def _note(self, event: str, task: Task) -> None:
        record = LogRecord(
            at=time.time(),
            level="info",
            event=event,
            message=f"{event}: {task.task_id}, version {task.base_version}",
            task_id=task.task_id,
        )
        self._records.append(record)

    async def _post(
        self, connection: Connection, path: str, request: Message, kind: type[M]
    ) -> M:
        answer = await self._until_answered(connection, path, _json(request))
        return msgspec.json.decode(answer.body, type=kind)

    async def _until_answered(
        self,
        connection: Connection,
        path: str,
        *pieces: bytes,
        method: str = "POST",
        **options: Any,
    ) -> Answer:
        """Ask until it is answered, as patient as a worker is. Raises RefusedError."""
        attempt = 0
        while True:
            wait_s, is_final = 0.0, False
            try:
                answer = await connection.ask(method, path, *pieces, **options)
            except (OSError, EOFError) as error:
                what = type(error).__name__
            else:
                if answer.status < 300:
                    return answer
                what = msgspec.json.decode(answer.body, type=ErrorBody).code
                wait_s = float(answer.headers.get("retry-after", "0"))
                is_final = answer.status not in (429, 503)
            self._heard.refusals[f"/{path.split('/')[1]} {what}"] += 1
            if is_final:
                raise RefusedError(f"{path}: {what}")
            await asyncio.sleep(wait_s + self._retry.delay_s(attempt))
            attempt += 1


def _json(message: Message) -> bytes:
    return msgspec.json.encode(message)
