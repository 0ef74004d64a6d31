"""A whole coordinator below HTTP: real SQLite, real blobs, a model of 452 numbers.

`World` tells stories of a fleet in plain calls: register, claim, submit, close.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import ModelShape, layout_hash, num_params, shape_to_json
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import (
    EXACT,
    ClaimRequest,
    EvaluationAnswer,
    EvaluationRequest,
    FailRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    RegisterAnswer,
    RegisterRequest,
    ReleaseRequest,
    SubmissionAnswer,
    SubmissionMeta,
    Task,
    TaskAnswer,
)
from bitnet_ext.wire.verdicts import FailCode, WorkerPhase
from coordinator.domain.manifest import (
    HELD_OUT_ID,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    corpus_hash,
    encode_manifest,
)
from coordinator.domain.plan import TrainingPlan
from coordinator.domain.round_time import first_round_s
from coordinator.service.claiming import claim
from coordinator.service.closing import RoundCloser
from coordinator.service.evaluating import take_evaluation
from coordinator.service.fleet import RUNNING, Fleet
from coordinator.service.renewing import heartbeat
from coordinator.service.returning import fail, release, sweep_leases
from coordinator.service.roster import register
from coordinator.service.seeding import add_epoch, add_evaluation
from coordinator.service.starting import reconcile
from coordinator.service.submitting import Intake
from coordinator.service.version_blobs import (
    ServerState,
    first_state,
    read_state,
    write_version,
)
from coordinator.store import rounds, runs, tasks, versions, workers
from coordinator.store.blobs import BlobKind, Blobs
from coordinator.store.engine import Store
from coordinator.store.rows import RoundRow, RunRow, TaskRow, WorkerRow
from coordinator.store.tables import metadata, submissions
from tests.fakes import FakeClock, FakeFs, FakeRng, MadeToFailError

T = TypeVar("T")
Vector = NDArray[np.float32]

#: 452 numbers; sequences of 8 tokens.
SHAPE = ModelShape(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=4,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    seq_len=8,
)
NUM_PARAMS = num_params(SHAPE)
#: A batch is 16 tokens, a probe 64; frames are fp32, so that sums are exact.
PLAN = TrainingPlan(
    batch_size=2, round_s=60.0, codec="fp32", broadcast=EXACT, evaluate_every=10
)
SECRET = b"s" * 32


def write_corpus(
    folder: Path,
    *,
    sizes: tuple[int, ...] = (1000, 504),
    vocab_size: int = SHAPE.vocab_size,
) -> Manifest:
    """Prepare a corpus by hand: training shards of `sizes` tokens, 100 held out."""
    folder.joinpath("tokenized").mkdir(parents=True, exist_ok=True)
    named = {HELD_OUT_ID: 100} | {f"train-{n:05d}": s for n, s in enumerate(sizes)}
    shards = [_write_shard(folder, name, size) for name, size in named.items()]
    content = b"a tokenizer that nothing reads"
    (folder / "tokenized" / TOKENIZER_NAME).write_bytes(content)
    tokenizer = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        vocab_size=vocab_size,
        eot_id=0,
        tokenizer_sha256=tokenizer,
        corpus_sha256=corpus_hash(
            shards, vocab_size=vocab_size, eot_id=0, tokenizer_sha256=tokenizer
        ),
        shards=shards,
        held_out_gzip_bytes=200,
        created_at=1.0,
    )
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest beside the shards."""
    path = folder / "tokenized" / MANIFEST_NAME
    path.write_bytes(encode_manifest(manifest))


def _write_shard(folder: Path, shard_id: str, num_tokens: int) -> Shard:
    data = (np.arange(num_tokens) % SHAPE.vocab_size).astype("<i4").tobytes()
    (folder / "tokenized" / f"{shard_id}.bin").write_bytes(data)
    return Shard(
        shard_id=shard_id,
        num_tokens=num_tokens,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        text_bytes=3 * num_tokens,
        num_documents=-(-num_tokens // SHAPE.vocab_size),
        held_out=shard_id == HELD_OUT_ID,
        synthetic=False,
    )


@contextmanager
def open_world(folder: Path) -> Iterator[World]:
    """Open a coordinator in `folder`, with a corpus and tables but without a run."""
    data, corpus = folder / "data", folder / "corpus"
    data.mkdir(exist_ok=True)
    manifest = write_corpus(corpus)
    store = Store(data / "fleet.db")
    workbench = ThreadPoolExecutor(2)
    fs, rng = FakeFs(), FakeRng()
    told: list[tuple[str, object]] = []
    try:
        store.write_now(metadata.create_all)
        fleet = Fleet(
            store=store,
            blobs=Blobs(data, fs, rng),
            fs=fs,
            clock=(clock := FakeClock()),
            rng=rng,
            corpus=corpus,
            on_event=lambda kind, body, _at: told.append((kind, body)),
            secret=SECRET,
            workbench=workbench,
            heartbeat_s=5.0,
            keep_versions=20,
            manifest=manifest,
        )
        with asyncio.Runner() as runner:
            yield World(fleet, clock, rng, fs, told, runner)
    finally:
        workbench.shutdown()
        store.close()


class World:
    """A fleet and everybody in it, one call after another."""

    def __init__(
        self,
        fleet: Fleet,
        clock: FakeClock,
        rng: FakeRng,
        fs: FakeFs,
        told: list[tuple[str, object]],
        runner: asyncio.Runner,
    ) -> None:
        self.fleet = fleet
        self.clock = clock
        self.rng = rng
        self.fs = fs
        #: Kind and body of everything published.
        self.told = told
        self._runner = runner
        self._claims = 0
        self._submissions = 0
        self.closer = RoundCloser(fleet)

    def do(self, act: Coroutine[Any, Any, T]) -> T:
        """Run a use case to its end."""
        return self._runner.run(act)

    def read(self, act: Callable[[Connection], T]) -> T:
        """Run `act` on a snapshot."""
        return self.fleet.store.read_now(act)

    def write(self, act: Callable[[Connection], T]) -> T:
        """Run `act` in a transaction."""
        return self.fleet.store.write_now(act)

    # -- the run ---------------------------------------------------------------

    def start_run(
        self,
        plan: TrainingPlan = PLAN,
        *,
        seeded: bool = True,
        scored: bool = False,
        token_budget: int | None = None,
    ) -> RunRow:
        """Make a run of the tiny model; `scored`: with its root's evaluation."""
        weights = np.linspace(-1.0, 1.0, NUM_PARAMS, dtype=np.float32)
        root = first_state(1, weights, plan.round_kind)
        blobs = write_version(self.fleet.blobs, root, layout_hash(SHAPE))
        manifest, now = self.fleet.the_manifest(), self.clock.now()

        def add(connection: Connection) -> RunRow:
            runs.add_run(
                connection,
                run_id="r-1",
                state=RUNNING,
                seed=7,
                preset="tiny",
                model_json=msgspec.json.encode(shape_to_json(SHAPE)).decode(),
                layout_hash=layout_hash(SHAPE).hex(),
                tokenizer_hash=manifest.tokenizer_sha256,
                corpus_hash=manifest.corpus_sha256,
                plan_json=msgspec.json.encode(plan).decode(),
                token_budget=token_budget,
                root_version=1,
                created_at=now,
            )
            versions.add_version(
                connection,
                version=1,
                run_id="r-1",
                created_at=now,
                tokens_total=0,
                num_submissions=0,
                plan_json=msgspec.json.encode(plan).decode(),
                published_sha256=blobs.published.sha256,
                published_bytes=blobs.published.num_bytes,
                state_sha256=blobs.state.sha256,
                state_bytes=blobs.state.num_bytes,
            )
            rounds.open_round(
                connection,
                run_id="r-1",
                base_version=1,
                round_s=first_round_s(plan),
                now=now,
            )
            run = _found(runs.newest_run(connection))
            if scored:
                add_evaluation(
                    connection, run, manifest, version=1, now=now, rng=self.rng
                )
            if seeded:
                add_epoch(connection, run, manifest)
            return _found(runs.newest_run(connection))

        return self.write(add)

    def run_row(self) -> RunRow:
        """Return the newest run."""
        return _found(self.read(runs.newest_run))

    def change_run(self, **columns: Any) -> None:
        """Set columns of the run."""
        self.write(lambda c: runs.change_run(c, "r-1", **columns))

    def epoch_tokens(self, epoch: int) -> int:
        """Return the tokens of an epoch that were accepted and not filtered."""
        query = select(func.sum(submissions.c.tokens)).where(
            submissions.c.epoch == epoch, submissions.c.state != "filtered"
        )
        return int(self.read(lambda c: c.execute(query).scalar_one()) or 0)

    def live_round(self) -> RoundRow:
        """Return the round that is open or closing."""
        run_id = self.run_row().run_id
        return _found(self.read(lambda c: rounds.live_round(c, run_id)))

    def task(self, task_id: str) -> TaskRow:
        """Return a task."""
        return _found(self.read(lambda c: tasks.find_task(c, task_id)))

    def worker(self, worker_id: str) -> WorkerRow:
        """Return a worker."""
        return _found(self.read(lambda c: workers.find_worker(c, worker_id)))

    def state(self, version: int) -> ServerState:
        """Return weights and momentum of a version."""
        return read_state(self.fleet.blobs, version)

    def sweep(self) -> int:
        """End leases that ran out, as if that had been done each second until now."""
        self.fleet.swept_at = None
        count = self.do(sweep_leases(self.fleet))
        self.fleet.swept_at = None
        return count

    # -- what workers do -------------------------------------------------------

    def register(self, worker_id: str = "w1", **fields: Any) -> RegisterAnswer:
        """Register a worker."""
        said: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "worker_id": worker_id,
            "name": worker_id,
            "package_version": "0.1.0",
            "cpu_model": "fake",
            "isa": "generic",
            "threads": 1,
        }
        return self.do(register(self.fleet, RegisterRequest(**said | fields)))

    def set_speed(self, worker_id: str, tokens_per_s: float) -> None:
        """Pretend that a worker was measured."""
        self.write(
            lambda c: workers.change_worker(c, worker_id, tokens_per_s=tokens_per_s)
        )

    def claim(self, worker_id: str = "w1", claim_id: str | None = None) -> Task | None:
        """Claim; a fresh `claim_id` where none is given."""
        self._claims += 1
        request = claim_request(worker_id, claim_id or f"c-{self._claims}")
        return self.do(claim(self.fleet, request))

    def claimed(self, worker_id: str = "w1", claim_id: str | None = None) -> Task:
        """Claim, and be sure to get a task."""
        return _found(self.claim(worker_id, claim_id))

    def heartbeat(
        self, task: Task | None = None, worker_id: str = "w1", **fields: Any
    ) -> HeartbeatAnswer:
        """Send a heartbeat, with what was done of `task`."""
        said: dict[str, Any] = {"worker_id": worker_id, "phase": WorkerPhase.TRAINING}
        if task is not None:
            said |= {"task_id": task.task_id, "lease_id": task.lease_id}
        return self.do(heartbeat(self.fleet, HeartbeatRequest(**said | fields)))

    def release(self, task: Task, worker_id: str = "w1") -> TaskAnswer:
        """Give a task back."""
        request = ReleaseRequest(worker_id=worker_id, lease_id=task.lease_id)
        return self.do(release(self.fleet, task.task_id, request))

    def fail(
        self,
        task: Task,
        worker_id: str = "w1",
        code: FailCode = FailCode.OUT_OF_MEMORY,
    ) -> TaskAnswer:
        """Say that a task cannot be done."""
        request = FailRequest(
            worker_id=worker_id,
            lease_id=task.lease_id,
            code=code,
            message="too large",
        )
        return self.do(fail(self.fleet, task.task_id, request))

    def meta(self, task: Task, worker_id: str = "w1", **fields: Any) -> SubmissionMeta:
        """Return the JSON block of an honest submission, changed by `fields`."""
        self._submissions += 1
        said: dict[str, Any] = {
            "submission_id": f"s-{self._submissions}",
            "task_id": task.task_id,
            "lease_id": task.lease_id,
            "worker_id": worker_id,
            "base_version": task.base_version,
            "num_steps": task.num_steps,
            "tokens": task.byte_length // 4,
            "loss_first": 3.0,
            "loss_last": 2.0,
            "loss_mean": 2.5,
            "compute_s": 1.0,
            "download_s": 0.1,
            "download_bytes": 10,
            "cpu_s": 1.0,
        }
        return SubmissionMeta(**said | fields)

    def send(self, body: bytes, piece: int = 1 << 16) -> SubmissionAnswer:
        """Send a body in pieces, as the route does."""

        async def upload() -> SubmissionAnswer:
            intake = Intake(self.fleet)
            try:
                for start in range(0, len(body), piece):
                    await intake.feed(body[start : start + piece])
                return await intake.finish()
            finally:
                await intake.close()

        return self.do(upload())

    def submit(
        self,
        task: Task,
        worker_id: str = "w1",
        value: float | Vector = 0.5,
        *,
        num_steps: int | None = None,
    ) -> SubmissionAnswer:
        """Submit a pseudo-gradient that is `value` everywhere; None: of all steps."""
        trained: dict[str, int] = {}
        if num_steps is not None:
            batch_tokens = task.batch_size * task.seq_len
            tokens = min(num_steps * batch_tokens, task.byte_length // 4)
            trained = {"num_steps": num_steps, "tokens": tokens}
        meta = self.meta(task, worker_id, **trained)
        return self.send(body(meta, frame(task, value)))

    def woken_by(self, *bodies: bytes) -> list[set[str]]:
        """Send bodies one after another; return the bells that each of them rang."""

        async def story() -> list[set[str]]:
            fleet, woken = self.fleet, []
            for one in bodies:
                bells = {"round_ready": fleet.round_ready, "work": fleet.work}
                waiting = {
                    asyncio.create_task(bell.wait(), name=name)
                    for name, bell in bells.items()
                }
                await asyncio.sleep(0)  # they wait
                intake = Intake(fleet)
                await intake.feed(one)
                await intake.finish()
                await intake.close()
                done, still = await asyncio.wait(waiting, timeout=0.0)
                woken.append({task.get_name() for task in done})
                for task in still:
                    task.cancel()
            return woken

        return self.do(story())

    def score(self, task: Task, nats: float = 200.0, **fields: Any) -> EvaluationAnswer:
        """Submit the score of an evaluation task, changed by `fields`."""
        shard = self.fleet.the_manifest().held_out_shard()
        self._submissions += 1
        said: dict[str, Any] = {
            "worker_id": "w1",
            "lease_id": task.lease_id,
            "submission_id": f"s-{self._submissions}",
            "version": task.base_version,
            "nats": nats,
            "tokens": shard.num_tokens - shard.num_documents,
            "bytes": shard.text_bytes,
            "compute_s": 1.0,
        }
        request = EvaluationRequest(**said | fields)
        return self.do(take_evaluation(self.fleet, task.task_id, request))

    def close_round(self) -> bool:
        """Close the round that is ready, if one is."""
        return self.do(self.closer.close_one())

    def close_over_a_crash(self, ordinal: int) -> None:
        """Crash at a call of the file system, see nothing done, close it anew."""
        before = self.everything()
        with self.fs.crashing(ordinal), pytest.raises(MadeToFailError):
            self.close_round()

        reconcile(self.fleet)
        assert self.everything() == before
        self.closer = RoundCloser(self.fleet)  # a new process remembers nothing
        assert self.close_round()

    def train_round(self, *values: float) -> None:
        """Let workers w1, w2, ... train a round and close it."""
        held = [self.claimed(f"w{n}") for n in range(1, len(values) + 1)]
        self.clock.advance(10.0)
        for number, (task, value) in enumerate(zip(held, values, strict=True), 1):
            self.submit(task, f"w{number}", value)
        if not self.close_round():
            raise AssertionError("the round was not ready to close")

    # -- everything ------------------------------------------------------------

    def everything(self) -> dict[str, Any]:
        """Return all rows of all tables and the bytes of all blobs."""

        def dump(connection: Connection) -> dict[str, Any]:
            return {
                table.name: sorted(map(repr, connection.execute(select(table))))
                for table in metadata.sorted_tables
            }

        return self.read(dump) | self.blobs()

    def blobs(self) -> dict[str, bytes]:
        """Return the bytes of all blobs, by kind and name."""
        blobs = self.fleet.blobs
        return {
            f"{kind}/{name}": blobs.path(kind, name).read_bytes()
            for kind in BlobKind
            for name in blobs.names(kind)
        }


def claim_request(worker_id: str, claim_id: str) -> ClaimRequest:
    """Return a claim as a worker of today makes it."""
    return ClaimRequest(
        protocol_version=PROTOCOL_VERSION, worker_id=worker_id, claim_id=claim_id
    )


def frame(
    task: Task,
    value: float | Vector,
    *,
    codec: Codec = Codec.FP32,
    shape: ModelShape = SHAPE,
) -> bytes:
    """Return the frame of a pseudo-gradient that is `value` everywhere."""
    vector = np.full(num_params(shape), value, dtype=np.float32)
    header = FrameHeader(
        kind=FrameKind(task.round_kind),
        codec=codec,
        layout_hash=layout_hash(shape),
        version=task.base_version,
        num_elements=len(vector),
    )
    return encode_frame(header, encode(codec, vector))


def body(meta: SubmissionMeta, frame: bytes) -> bytes:
    """Return the body of `POST /gradient`."""
    block = msgspec.json.encode(meta)
    return len(block).to_bytes(4, "little") + block + frame


def _found(value: T | None) -> T:
    if value is None:
        raise AssertionError("it should be there")
    return value
