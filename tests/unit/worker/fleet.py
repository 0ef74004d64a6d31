"""A stand-in coordinator with a run, and a worker whose model and clock are fakes."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FrameHeader, FrameKind, decode_frame, encode_frame
from bitnet_ext.layout import ModelShape, layout_hash, num_params, shape_to_json
from bitnet_ext.wire.messages import (
    EvaluationAnswer,
    HeartbeatAnswer,
    RegisterAnswer,
    SubmissionAnswer,
    SubmissionMeta,
    Task,
    TaskAnswer,
)
from bitnet_ext.wire.verdicts import LeaseState, Optimiser, SubmissionState
from tests.unit.worker.shapes import EOT, SMALL, a_task, random_tokens, seeded_weights
from tests.unit.worker.stand_in import KEY, Reply, Request, StandIn, says
from worker.calibrate import Calibration
from worker.client import Client
from worker.evaluate import Score
from worker.heartbeat import Heartbeat
from worker.loop import Worker
from worker.retry import Retry
from worker.settings import WorkerSettings
from worker.shutdown import Shutdown
from worker.train import Moments, TrainResult
from worker.tune import Setup, Trial
from worker.work import Kit

NUM_TOKENS = 128
EMPTY = Reply(204, headers={"Retry-After": "3"})
EVALUATED = says(EvaluationAnswer(submission_id="id-2", task_id="t1", version=1))
ENV = {"BITNET_WORKER_API_KEY": KEY, "BITNET_WORKER_NAME": "box-1"}


def published(shape: ModelShape = SMALL, version: int = 1, seed: int = 0) -> bytes:
    """Return the frame of a weight version."""
    header = FrameHeader(
        kind=FrameKind.WEIGHTS,
        codec=Codec.FP32,
        layout_hash=layout_hash(shape),
        version=version,
        num_elements=num_params(shape),
    )
    return encode_frame(header, encode(Codec.FP32, seeded_weights(shape, seed)))


class FakeTrainer:
    """Trains nothing, in two steps of a second; `during` runs between them.

    Ends after the first where that is enough.
    """

    def __init__(self, clock: list[float]) -> None:
        self.calibrated: list[ModelShape] = []
        #: The moments that each training started from.
        self.started_from: list[Moments | None] = []
        self.during: Callable[[], None] = lambda: None
        #: Runs after the last step.
        self.afterwards: Callable[[], None] = lambda: None
        #: What an evaluation comes to.
        self.nats = 123.0
        self.num_steps = 0
        self._clock = clock

    def calibrate(self, shape, batch_size, optimiser, hooks) -> Calibration:
        self.calibrated.append(shape)
        hooks.check()
        hooks.progress(1000, 1.0)
        setup = Setup(variant="avx2", threads=3, micro_batch=2)
        return Calibration([Trial(setup, (1.0,))], 1000)

    def train(self, shape, base, moments, tokens, task, hooks) -> TrainResult:
        self.started_from.append(moments)
        tokens_done = self._two_steps(task, hooks)
        moments = (moments or Moments.zeros(shape)).copy()
        moments.step.add_(2)
        num_tokens = task.byte_length // 4
        gradient = np.full(num_params(shape), 0.0012, dtype=np.float32)
        gradient[::256] = 1.0
        return TrainResult(
            pseudo_gradient=gradient,
            moments=moments,
            num_steps=task.num_steps * tokens_done // num_tokens,
            tokens=tokens_done,
            loss_first=4.0,
            loss_last=3.0,
            loss_mean=3.5,
            compute_s=2.0,
        )

    def evaluate(self, shape, weights, tokens, task, hooks) -> Score:
        self._two_steps(task, hooks)
        return Score(nats=self.nats, tokens=len(tokens) - 1, compute_s=2.0)

    def _two_steps(self, task, hooks) -> int:
        num_tokens = task.byte_length // 4
        hooks.check()
        self._clock[0] += 1.0
        self.num_steps += 1
        hooks.progress(num_tokens // 2, 1.0)
        self.during()
        hooks.check()
        if hooks.enough():
            return num_tokens // 2
        self._clock[0] += 1.0
        self.num_steps += 1
        hooks.progress(num_tokens, 1.0)
        self.afterwards()
        return num_tokens


class Fleet:
    """One worker against one stand-in. Time passes only where a test lets it."""

    def __init__(self, coordinator: StandIn, tmp_path: Path, **env: str) -> None:
        self.coordinator = coordinator
        self.now = [100.0]
        self.waits: list[float] = []
        self.trainer = FakeTrainer(self.now)
        self.beacon = tmp_path / "alive"
        self.settings = WorkerSettings.from_env(
            ENV
            | {
                "BITNET_COORDINATOR_URL": coordinator.url,
                "BITNET_HEALTH_BEACON": str(self.beacon),
            }
            | env
        )
        self.shutdown = Shutdown(self.settings.shutdown_s, clock=self.clock)
        self._clients = [Client(coordinator.url, KEY) for _ in range(2)]
        self.heartbeat = Heartbeat(
            self._clients[0],
            self.settings.worker_id,
            self.settings.beacon,
            clock=self.clock,
        )
        ids = itertools.count(1)
        self.num_registered = 0
        self.worker = Worker(
            Kit(
                settings=self.settings,
                client=self._clients[1],
                heartbeat=self.heartbeat,
                trainer=self.trainer,
                shutdown=self.shutdown,
                retry=Retry(random.Random(0), self.sleep),
                clock=self.clock,
                cpu_s=self.clock,
                new_id=lambda: f"id-{next(ids)}",
            ),
            self._registered,
        )
        self.tokens = random_tokens(NUM_TOKENS + 1)
        self.tokens[0] = EOT
        self._say_yes()

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def clock(self) -> float:
        return self.now[0]

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now[0] += seconds

    def _registered(self) -> None:
        self.num_registered += 1

    def _say_yes(self) -> None:
        self.runs("r1", SMALL)
        self.beats()
        self.coordinator.on("POST /gradient", accepts)
        self.coordinator.on("POST /tasks/t1/evaluation", EVALUATED)
        for verb in ("fail", "release"):
            self.coordinator.on(
                f"POST /tasks/t1/{verb}", says(TaskAnswer(task_id="t1", state="x"))
            )

    def runs(self, run_id: str, shape: ModelShape) -> None:
        """Let the coordinator train this model from now on, at version 1."""
        self.frame = published(shape)
        self.coordinator.on(
            "POST /register", says(register_answer(run_id=run_id, shape=shape))
        )
        self.coordinator.serve("/weights/1", self.frame)
        self.coordinator.serve("/corpus/train-00000", self.tokens.tobytes())

    def beats(self, **changes: object) -> None:
        """Answer heartbeats like this from now on."""
        answer = HeartbeatAnswer(lease=LeaseState.HELD, lease_s=60.0, heartbeat_s=5.0)
        self.coordinator.on(
            "POST /heartbeat", says(msgspec.structs.replace(answer, **changes))
        )

    def task(self, **changes: object) -> Task:
        """Return a task on the one shard and version that there is."""
        content = self.tokens.tobytes()
        return msgspec.structs.replace(
            a_task(NUM_TOKENS),
            base_sha256=hashlib.sha256(self.frame).hexdigest(),
            shard_sha256=hashlib.sha256(content).hexdigest(),
            shard_bytes=len(content),
            **changes,
        )

    def hands_out(self, *tasks: Task) -> None:
        """Answer claims with these, then with nothing."""
        self.coordinator.on("POST /work", *(says(task) for task in tasks), EMPTY)

    def turns(self, number: int) -> None:
        for _ in range(number):
            self.worker.turn()

    def failures(self) -> list[dict]:
        """Return what was said of tasks that could not be done."""
        return [r.json() for r in self.coordinator.asked("POST /tasks/t1/fail")]

    def releases(self) -> list[dict]:
        """Return what was said of tasks that were given back."""
        return [r.json() for r in self.coordinator.asked("POST /tasks/t1/release")]

    def submissions(self) -> list[tuple[SubmissionMeta, bytes]]:
        """Return metadata and frame of everything submitted, in order."""
        return [taken_apart(r.body) for r in self.coordinator.asked("POST /gradient")]


def register_answer(*, run_id: str, shape: ModelShape) -> RegisterAnswer:
    return RegisterAnswer(
        protocol_version=1,
        worker_id="box-1",
        run_id=run_id,
        preset="tiny",
        model=shape_to_json(shape),
        layout_hash=layout_hash(shape).hex(),
        tokenizer_hash="0" * 64,
        corpus_hash="0" * 64,
        heartbeat_s=3600.0,
        batch_size=4,
        optimiser=Optimiser.ADAMW,
    )


def accepts(request: Request) -> Reply:
    """Accept a submission."""
    taken_apart(request.body)
    return says(SubmissionAnswer(state=SubmissionState.ACCEPTED, round_id=1))


def taken_apart(body: bytes) -> tuple[SubmissionMeta, bytes]:
    size = int.from_bytes(body[:4], "little")
    meta = msgspec.json.decode(body[4 : 4 + size], type=SubmissionMeta)
    return meta, body[4 + size :]


def payload_of(frame: bytes, kind: FrameKind = FrameKind.DELTA) -> bytes:
    header, payload = decode_frame(frame)
    assert header.kind is kind
    return bytes(payload)


#: The model of another run.
OTHER = replace(SMALL, num_layers=1)
