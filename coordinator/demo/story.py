"""The story of the demo: prepare, start, train for a while, stop, report.

All state stays in one folder; running again with the same folder goes on.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bitnet_ext.wire.verdicts import RoundKind, WorkerPhase
from coordinator.control import Command, ResetPassword, Seed, TrainFor, ask
from coordinator.demo import report
from coordinator.demo.killing import Killing
from coordinator.demo.processes import (
    Child,
    StatusClient,
    end_properly_when_told,
    pause,
    start_coordinator,
    start_worker,
)
from coordinator.demo.text import prepare
from coordinator.domain.errors import StartError
from coordinator.service.fleet import FINISHED
from coordinator.service.view import FleetView

WORKERS: Final = ("demo-1", "demo-2")
_NOT_READY: Final = (WorkerPhase.STARTING, WorkerPhase.CALIBRATING)
#: Seconds between two looks at the fleet.
LOOK_S: Final = 0.5
#: How long the last round and its evaluation may take after the budget.
TAIL_S: Final = 180.0
#: The plan of the demo: short rounds, a small model, no end but that by time.
SETTINGS: Final = {
    "PRESET": "tiny",
    "ROUND_S": "12",
    "HEARTBEAT_S": "2",
    "KEEP_VERSIONS": "3",
    "EVALUATE_EVERY": "5",
    "BATCH_SIZE": "4",
    "LEARNING_RATE": "3e-3",
    # Two workers and a few dozen rounds: more momentum only adds noise (lab log).
    "OUTER_MOMENTUM": "0.3",
    "WARMUP_TOKENS": "100000",
    "TOKEN_BUDGET": "0",
}
#: What is different with gradient rounds: many, so that there are many steps.
OF_KIND: Final = {
    RoundKind.DELTA: {},
    RoundKind.GRADIENT: {
        "ROUND_S": "2",
        "LEARNING_RATE": "2e-2",
        "OUTER_MOMENTUM": "0.8",
        "WARMUP_TOKENS": "50000",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the user can choose."""

    minutes: float
    #: Holds everything: text, weights, keys, logs.
    state: Path
    #: A folder of text; None: the docstrings of the standard library.
    corpus: Path | None
    port: int
    #: Kill one worker with -9 in mid-task.
    kill: bool
    #: Of a run that begins; one that goes on keeps its own.
    round_kind: RoundKind

    def __post_init__(self) -> None:
        if not 0.0 < self.minutes < 1e6:
            raise ValueError(f"minutes must be a positive number, got {self.minutes}")


@dataclass(slots=True, kw_only=True)
class Demo:
    """What runs."""

    options: DemoOptions
    data: Path
    status: StatusClient
    port: int
    workers: dict[str, Child] = field(default_factory=dict)

    def tell(self, command: Command) -> str:
        """Give the coordinator a command."""
        said = ask(self.data, command)
        if said is None:
            raise StartError("the coordinator does not listen on its control socket")
        return said

    def check_alive(self, killed: set[str]) -> None:
        """Raise StartError when a worker ended that nobody killed."""
        for name, child in self.workers.items():
            if name not in killed and not child.alive:
                raise StartError(f"{name} ended: {child.last_words()}")


def run_demo(options: DemoOptions) -> int:
    """Run the demo; return the exit status."""
    folder = options.state.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    print(f"State folder: {folder}")
    manifest = prepare(folder / "corpus", options.corpus)
    report.print_corpus(manifest)
    end_properly_when_told()
    started_at = time.time()
    with _running(options, folder) as demo:
        _print_door(demo, folder)
        _wait_for_workers(demo, started_at)
        outcome = _train(demo)
        view = demo.status.look()
    print(report.sample(folder, view), flush=True)
    return report.print_result(folder / "data", manifest, view, outcome)


@contextmanager
def _running(options: DemoOptions, folder: Path) -> Iterator[Demo]:
    """Run coordinator and workers as long as the block runs."""
    key = _kept_secret(folder / "worker-key")
    kind = options.round_kind
    settings = SETTINGS | {"ROUND_KIND": kind} | OF_KIND[kind]
    env = {f"BITNET_COORD_{name}": value for name, value in settings.items()}
    env |= {
        "BITNET_COORD_DATA": str(folder / "data"),
        "BITNET_COORD_CORPUS": str(folder / "corpus"),
        "BITNET_COORD_PORT": str(options.port),
        "BITNET_COORD_WORKER_API_KEY": key,
    }
    coordinator, port = start_coordinator(env, folder)
    demo = Demo(
        options=options,
        data=folder / "data",
        status=StatusClient(port, key),
        port=port,
    )
    threads = max(1, (os.cpu_count() or 1) // len(WORKERS))
    try:
        for name in WORKERS:
            demo.workers[name] = start_worker(
                name, port=port, key=key, threads=threads, folder=folder
            )
        yield demo
    finally:
        for child in demo.workers.values():
            child.ask_to_stop()
        for child in demo.workers.values():
            child.wait()
        coordinator.ask_to_stop()
        coordinator.wait()


def _kept_secret(path: Path) -> str:
    """Return a secret that is made once and kept in a file only its owner reads."""
    if not path.exists():
        _write_secret(path, secrets.token_urlsafe(32))
    return path.read_text()


def _write_secret(path: Path, secret: str) -> None:
    path.touch(mode=0o600)
    path.write_text(secret)


def _print_door(demo: Demo, folder: Path) -> None:
    """Print where the page is, and the password that opens it."""
    path = folder / "admin-password"
    if not path.exists():
        _write_secret(path, demo.tell(ResetPassword()).rpartition(" ")[2])
    print(f"Dashboard:    http://127.0.0.1:{demo.port}/admin/dashboard")
    print(f"Password:     {path.read_text()}", flush=True)


def _wait_for_workers(demo: Demo, started_at: float) -> None:
    """Return once both workers are calibrated and version 1 has its score."""
    print("Workers start and time a few training steps ...", flush=True)
    while True:
        view = demo.status.look()
        ready = [
            worker
            for worker in view.workers
            if worker.heartbeat_at >= started_at and worker.phase not in _NOT_READY
        ]
        if len(ready) >= len(WORKERS) and view.evaluations:
            return
        demo.check_alive(set())
        pause(LOOK_S)


def _train(demo: Demo) -> report.Outcome:
    """Train for the budget, or until Ctrl-C; return what was measured."""
    seconds = 60.0 * demo.options.minutes
    demo.tell(TrainFor(seconds=seconds))
    before = demo.status.look()
    if before.run is not None and before.run.epoch == 0:
        demo.tell(Seed())
    killing = Killing(demo.data, demo.workers, after_s=0.2 * seconds)
    screen = report.Screen(seconds, sys.stdout)
    started, started_at = time.monotonic(), time.time()
    view = before
    while view.run is None or view.run.state != FINISHED:
        try:
            pause(LOOK_S)
            view = _look(demo, killing, screen, time.monotonic() - started)
        except KeyboardInterrupt:
            print("\nStopping: the open round closes, then its version is scored.")
            demo.tell(TrainFor(seconds=1e-3))
            screen.is_ending = True
    return report.outcome(before, view, started_at, killing)


def _look(
    demo: Demo, killing: Killing, screen: report.Screen, elapsed_s: float
) -> FleetView:
    view = demo.status.look()
    screen.draw(view, elapsed_s)
    if demo.options.kill:
        killing.step(view, elapsed_s)
    demo.check_alive(killing.killed)
    if elapsed_s > 60.0 * demo.options.minutes + TAIL_S:
        raise StartError(f"the last round did not close within {TAIL_S:.0f} s")
    return view
