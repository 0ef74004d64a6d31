"""A real coordinator process, real worker processes, and a worker moved by hand.

Nothing of ours is replaced: what a test needs to differ (a clock that runs fast, an
outer step of the wrong sign) is another main module for the same coordinator.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import ModelShape, num_params, shape_from_json
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import (
    ClaimRequest,
    EvaluationRequest,
    HeartbeatRequest,
    RegisterAnswer,
    RegisterRequest,
    ReleaseRequest,
    SubmissionMeta,
    Task,
)
from bitnet_ext.wire.verdicts import WorkerPhase
from coordinator.control import Command, ask
from coordinator.domain.manifest import Manifest
from coordinator.service.corpus import Recipe, prepare_corpus
from worker.client import Client, NoWork, submission_body
from worker.weights import read_weights

ROOT = Path(__file__).parents[2]
KEY = "k" * 40
TIMEOUT_S = 60.0
#: The main module of the coordinator, for tests that run whole tests differently.
MODULE_VARIABLE = "BITNET_TEST_COORDINATOR_MODULE"


def write_text(folder: Path, *, num_files: int, words: int, seed: int = 0) -> None:
    """Write files of invented prose: few words, some follow others, all by a seed."""
    chance = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ter", "un", "ves", "or", "dan", "pil", "quo"]
    known = [
        "".join(chance.choices(syllables, k=chance.randint(1, 3))) for _ in "x" * 60
    ]
    after = {word: chance.sample(known, 4) for word in known}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        word, said = chance.choice(known), []
        for _ in range(words):
            word = chance.choice(after[word])
            said.append(word)
        (folder / f"{number:03}.txt").write_text(" ".join(said) + ".\n")


def make_corpus(
    folder: Path, *, num_files: int = 24, words: int = 400, **recipe: Any
) -> Manifest:
    """Write and prepare a corpus of invented text."""
    write_text(folder, num_files=num_files, words=words)
    settings = {"vocab_size": 300, "held_out_bytes": 6000} | recipe
    return prepare_corpus(folder, Recipe(**settings), now=0.0)


def wait_for(what: str, look: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Return what `look` returns as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        pause.wait(0.05)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


class CoordinatorProcess:
    """A coordinator on a loopback port; `settings` are BITNET_COORD_ names."""

    def __init__(self, folder: Path, settings: dict[str, Any], module: str) -> None:
        self.data = folder / "data"
        self.log_path = folder / "coordinator.log"
        self._module = module
        self._env = {
            "BITNET_COORD_DATA": str(self.data),
            "BITNET_COORD_CORPUS": str(folder / "corpus"),
            "BITNET_COORD_PORT": "0",
            "BITNET_COORD_WORKER_API_KEY": KEY,
            "BITNET_COORD_PRESET": "tiny",
            **{f"BITNET_COORD_{name}": str(value) for name, value in settings.items()},
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self._module, "serve"],
                cwd=ROOT,
                env={**os.environ, **self._env},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Dashboard: "), self.log_path.read_text()[-3000:]
        self.port = int(line.rsplit(":", 1)[1].split("/")[0])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def start_again(self) -> None:
        """Start where the one before has ended, on its port: workers find it there."""
        self._reap()
        self._env["BITNET_COORD_PORT"] = str(self.port)
        self.start()

    def _reap(self) -> int:
        assert self.process.stdout is not None
        status = self.process.wait(60.0)
        self.process.stdout.close()
        return status

    def tell(self, command: Command) -> str:
        said = ask(self.data, command)
        assert said is not None
        return said

    def status(self) -> Any:
        request = urllib.request.Request(
            f"{self.url}/status", headers={"X-Api-Key": KEY}
        )
        with urllib.request.urlopen(request, timeout=30.0) as response:
            return json.load(response)

    def wait_for_version(self, version: int) -> Any:
        """Return the status once this version is published and a round is open."""

        def look() -> Any:
            status = self.status()
            is_there = status["run"]["newest_version"] >= version
            return status if is_there and status["round"]["state"] == "open" else None

        return wait_for(f"version {version}", look)

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Read the database, beside the coordinator."""
        path = f"file:{self.data / 'fleet.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True)) as connection:
            return connection.execute(query, arguments).fetchall()


@contextlib.contextmanager
def coordinator(
    folder: Path, *, module: str | None = None, **settings: Any
) -> Iterator[CoordinatorProcess]:
    """Run a coordinator on `folder/corpus` as long as the block runs."""
    chosen = module or os.environ.get(MODULE_VARIABLE, "coordinator")
    process = CoordinatorProcess(folder, settings, chosen)
    process.start()
    try:
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def workers(
    folder: Path, url: str, *names: str, **env: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run worker processes of one thread each as long as the block runs."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name in names:
            with (folder / f"{name}.log").open("ab") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "worker", "run"],
                        cwd=ROOT,
                        env={**os.environ, **_worker_env(folder, url, name), **env},
                        stdout=log,
                        stderr=log,
                    )
                )
        yield running
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(60.0)


def _worker_env(folder: Path, url: str, name: str) -> dict[str, str]:
    return {
        "BITNET_COORDINATOR_URL": url,
        "BITNET_WORKER_API_KEY": KEY,
        "BITNET_WORKER_NAME": name,
        "BITNET_CPU_THREADS": "1",
        "BITNET_HEARTBEAT_SECONDS": "1",
        "BITNET_HEALTH_BEACON": str(folder / f"{name}.alive"),
        "BITNET_DATA": str(folder / "workers"),
    }


class Hand:
    """A worker moved by hand, over the worker's own client."""

    def __init__(self, url: str, manifest: Manifest, name: str = "hand") -> None:
        self.name = name
        self.manifest = manifest
        self.url = url
        self.client = Client(url, KEY)
        self._num_ids = 0

    def move_to(self, url: str) -> None:
        """Talk to a coordinator that has started again on another port."""
        self.client.close()
        self.url = url
        self.client = Client(url, KEY)

    def new_id(self) -> str:
        self._num_ids += 1
        return f"{self.name}-{self._num_ids}"

    def register(self, **changes: Any) -> RegisterAnswer:
        fields = {
            "protocol_version": PROTOCOL_VERSION,
            "worker_id": self.name,
            "name": self.name,
            "package_version": "0",
            "cpu_model": "hand",
            "isa": "none",
            "threads": 1,
        }
        self.answer = self.client.register(RegisterRequest(**(fields | changes)))
        return self.answer

    @property
    def shape(self) -> ModelShape:
        return shape_from_json(self.answer.model)

    def claim(self, claim_id: str | None = None) -> Task | None:
        request = ClaimRequest(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self.name,
            claim_id=claim_id or self.new_id(),
        )
        found = self.client.claim(request)
        return None if isinstance(found, NoWork) else found

    def claim_training(self) -> Task:
        """Claim until a training task comes; evaluations get an invented score."""

        def look() -> Task | None:
            task = self.claim()
            if task is not None and task.kind == "evaluate":
                self.evaluate(task)
                return None
            return task

        return wait_for("a training task", look)

    def evaluate(self, task: Task) -> None:
        shard = self.manifest.held_out_shard()
        request = EvaluationRequest(
            worker_id=self.name,
            lease_id=task.lease_id,
            submission_id=self.new_id(),
            version=task.base_version,
            nats=1.0,
            tokens=shard.num_tokens - shard.num_documents,
            bytes=task.text_bytes,
            compute_s=1.0,
        )
        self.client.evaluate(task.task_id, request)

    def release(self, task: Task) -> None:
        request = ReleaseRequest(
            worker_id=self.name, lease_id=task.lease_id, reason="test"
        )
        self.client.release(task.task_id, request)

    def heartbeat(self, task: Task, tokens_done: int) -> Any:
        return self.client.heartbeat(
            HeartbeatRequest(
                worker_id=self.name,
                phase=WorkerPhase.TRAINING,
                task_id=task.task_id,
                lease_id=task.lease_id,
                tokens_done=tokens_done,
            )
        )

    def weights(self, version: int) -> NDArray[np.float32]:
        """Fetch the published frame of a version."""
        request = urllib.request.Request(
            f"{self.url}/weights/{version}", headers={"X-Api-Key": KEY}
        )
        with urllib.request.urlopen(request, timeout=30.0) as response:
            return read_weights(response.read(), self.shape, version=version)

    def body(self, task: Task, vector: NDArray[np.float32], **changes: Any) -> bytes:
        """Return a submission of `vector`; `changes` go into its JSON block."""
        codec = Codec(task.codec)
        return self.body_of(task, encode(codec, vector), **changes)

    def body_of(self, task: Task, payload: bytes, **changes: Any) -> bytes:
        header = FrameHeader(
            kind=FrameKind(task.round_kind),
            codec=Codec(task.codec),
            layout_hash=bytes.fromhex(self.answer.layout_hash),
            version=task.base_version,
            num_elements=num_params(self.shape),
        )
        return submission_body(
            self.meta(task, **changes), encode_frame(header, payload)
        )

    def meta(self, task: Task, **changes: Any) -> SubmissionMeta:
        fields = {
            "submission_id": self.new_id(),
            "task_id": task.task_id,
            "lease_id": task.lease_id,
            "worker_id": self.name,
            "base_version": task.base_version,
            "num_steps": task.num_steps,
            "tokens": task.byte_length // 4,
            "loss_first": 1.0,
            "loss_last": 1.0,
            "loss_mean": 1.0,
            "compute_s": 1.0,
            "download_s": 1.0,
            "download_bytes": 1,
            "cpu_s": 1.0,
        }
        return SubmissionMeta(**(fields | changes))
