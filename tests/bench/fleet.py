"""A real fleet that trains for a while: each part a process, each worker one thread.

What it did is read from its database, beside the coordinator: asking the coordinator
would cost it CPU time, which is measured.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import WorkerPhase
from coordinator.app import DATABASE_NAME
from coordinator.control import Seed, TrainFor, ask
from coordinator.demo import story
from coordinator.demo.processes import Child, start_coordinator, start_worker
from coordinator.domain.errors import StartError
from coordinator.service.fleet import FINISHED
from coordinator.settings import PREFIX
from coordinator.store import runs, versions, workers
from coordinator.store.engine import read_once
from coordinator.store.rows import EvaluationRow, PointRow
from tests.bench.loops import PRESET
from tests.faults.signals import cpu_s

T = TypeVar("T")

#: The plan of the demo. Only the first and the last version are scored: a score would
#: take twice the share of one worker's time that it takes of two workers'.
SETTINGS: Final = story.SETTINGS | {
    "PRESET": PRESET,
    "EVALUATE_EVERY": str(10**6),
    "HEARTBEAT_S": "5",
}
COORDINATOR: Final = "coordinator"
#: How long workers may take to calibrate and to score the first version, in seconds.
START_S: Final = 600.0
#: Seconds between two looks.
LOOK_S: Final = 0.5
_NOT_READY: Final = (WorkerPhase.STARTING, WorkerPhase.CALIBRATING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a fleet did in its time."""

    #: Unix seconds, by the coordinator's clock.
    began_at: float
    stop_at: float
    #: All of the run; the last was published when the last round was back.
    versions: Sequence[PointRow]
    #: Of the last version.
    score: EvaluationRow
    #: CPU seconds of each process from the beginning until the last version was scored.
    cpu_s: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Held-out loss of the last version, nats a token."""
        return self.score.nats / self.score.tokens

    @property
    def coordinator_share(self) -> float:
        """The coordinator's share of all CPU seconds."""
        return self.cpu_s[COORDINATOR] / sum(self.cpu_s.values())


def train_fleet(
    folder: Path, corpus: Path, *, num_workers: int, seconds: float
) -> Training:
    """Train a new run on a prepared corpus; all that it leaves lies in `folder`.

    Time counts from when all workers have calibrated. Raises StartError for a process
    that ends, or takes far too long.
    """
    folder.mkdir()
    data = folder / "data"
    with running_fleet(folder, data, corpus, num_workers) as children:
        _wait(
            children,
            "workers that are ready",
            START_S,
            lambda: _is_ready(data, num_workers),
        )
        before = _cpu_s(children)
        for command in (TrainFor(seconds=seconds), Seed()):
            ask(data, command)
        _wait(
            children, "the last score", seconds + story.TAIL_S, lambda: _is_over(data)
        )
        after = _cpu_s(children)
    used = {name: after[name] - before[name] for name in after}
    return _look(data, lambda c: _training(c, seconds, used))


@contextmanager
def running_fleet(
    folder: Path, data: Path, corpus: Path, num_workers: int
) -> Iterator[Sequence[Child]]:
    """Run the coordinator, then the workers, as long as the block runs."""
    key = secrets.token_urlsafe(32)
    settings = SETTINGS | {
        "DATA": str(data),
        "CORPUS": str(corpus),
        "PORT": "0",
        "WORKER_API_KEY": key,
    }
    env = {PREFIX + name: value for name, value in settings.items()}
    with ExitStack() as stack:
        coordinator, port = start_coordinator(env, folder)
        stack.callback(end, coordinator)
        children = [coordinator]
        for number in range(1, num_workers + 1):
            name = f"worker-{number}"
            child = start_worker(name, port=port, key=key, threads=1, folder=folder)
            stack.callback(end, child)
            children.append(child)
        yield children


def end(child: Child) -> None:
    """Stop a process; where waiting for it is broken off, kill it."""
    try:
        child.ask_to_stop()
        child.wait()
    finally:
        child.kill()


def _wait(
    children: Sequence[Child], what: str, timeout_s: float, look: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        for child in children:
            if not child.alive:
                raise StartError(f"{child.name} ended: {child.last_words()}")
        if time.monotonic() > deadline:
            raise StartError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(LOOK_S)


def _look(data: Path, act: Callable[[Connection], T]) -> T:
    return read_once(data / DATABASE_NAME, act)


def _is_ready(data: Path, num_workers: int) -> bool:
    """Return whether all have calibrated, and the first version has its score."""

    def look(connection: Connection) -> bool:
        run = runs.newest_run(connection)
        known = workers.all_workers(connection)
        return (
            run is not None
            and versions.score_of(connection, run.root_version) is not None
            and len(known) == num_workers
            and all(worker.phase not in _NOT_READY for worker in known)
        )

    return _look(data, look)


def _is_over(data: Path) -> bool:
    run = _look(data, runs.newest_run)
    return run is not None and run.state == FINISHED


def _training(
    connection: Connection, seconds: float, used: Mapping[str, float]
) -> Training:
    run = runs.newest_run(connection)
    points = [] if run is None else versions.points_of(connection, run.run_id)
    score = versions.score_of(connection, points[-1].version) if points else None
    if run is None or run.stop_at is None or score is None:
        raise StartError("the run that has ended must have a score and a time to stop")
    return Training(
        began_at=run.stop_at - seconds,
        stop_at=run.stop_at,
        versions=points,
        score=score,
        cpu_s=used,
    )


def _cpu_s(children: Sequence[Child]) -> dict[str, float]:
    return {child.name: cpu_s(child.pid) for child in children}
