"""`KILL=1`: one worker dies in mid-task; how long until its stretch is trained?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import TaskState
from coordinator.app import DATABASE_NAME
from coordinator.demo.processes import Child
from coordinator.service.view import FleetView, WorkerView
from coordinator.store import rounds, tasks
from coordinator.store.engine import read_once
from coordinator.store.rows import TaskRow

#: A task is in its middle between these shares.
MIDDLE: Final = (0.1, 0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """Who was killed, when, and what it held."""

    name: str
    #: Monotonic seconds.
    at: float
    epoch: int
    shard_id: str
    start_token: int
    num_tokens: int


class Killing:
    """Kills one worker once, and watches its stretch."""

    def __init__(
        self, data: Path, workers: dict[str, Child], *, after_s: float
    ) -> None:
        self._database = data / DATABASE_NAME
        self._workers = workers
        self._after_s = after_s
        #: Names of the workers that were killed.
        self.killed: set[str] = set()
        #: None also where the one killed held nothing any more.
        self.victim: Victim | None = None
        #: Seconds until others had trained all of it; None while they have not.
        self.retrained_after_s: float | None = None

    def step(self, view: FleetView, elapsed_s: float) -> None:
        """Kill when the time has come; afterwards look whether the work is done."""
        if not self.killed:
            worker = view.workers[-1] if view.workers else None
            if elapsed_s >= self._after_s and worker and _in_mid_task(worker):
                self._kill(worker)
        elif (
            self.victim is not None
            and self.retrained_after_s is None
            and self._is_retrained(self.victim)
        ):
            self.retrained_after_s = time.monotonic() - self.victim.at
            print(
                f"\nThe stretch of {self.victim.name} is trained, "
                f"{self.retrained_after_s:.1f} s after its death.",
                flush=True,
            )

    def _kill(self, worker: WorkerView) -> None:
        """Kill a worker, unless its task has come back since the view was taken."""
        if self._held(worker) is None:
            return  # at a later look, then
        self._workers[worker.worker_id].kill()
        at = time.monotonic()
        self.killed.add(worker.worker_id)
        task = self._held(worker)
        if task is None:
            print(
                f"\nKilled {worker.worker_id} with -9, just after it had handed its "
                "task in: nothing of it has to be trained again.",
                flush=True,
            )
            return
        self.victim = Victim(
            name=worker.worker_id,
            at=at,
            epoch=task.epoch,
            shard_id=task.shard_id,
            start_token=task.start_token,
            num_tokens=task.num_tokens,
        )
        print(
            f"\nKilled {worker.worker_id} with -9: it had done {worker.tokens_done} "
            f"of {worker.num_tokens} tokens of {task.task_id}.",
            flush=True,
        )

    def _held(self, worker: WorkerView) -> TaskRow | None:
        task = read_once(
            self._database, lambda c: tasks.find_task(c, worker.task_id or "")
        )
        if task is None or task.lease_worker_id != worker.worker_id:
            return None
        return task if task.state == TaskState.LEASED else None

    def _is_retrained(self, victim: Victim) -> bool:
        def trained(connection: Connection) -> int:
            by_worker = rounds.tokens_within(
                connection,
                epoch=victim.epoch,
                shard_id=victim.shard_id,
                start=victim.start_token,
                end=victim.start_token + victim.num_tokens,
            )
            return sum(
                tokens for name, tokens in by_worker.items() if name != victim.name
            )

        return read_once(self._database, trained) >= victim.num_tokens


def _in_mid_task(worker: WorkerView) -> bool:
    if worker.phase != "training" or not worker.num_tokens:
        return False
    share = (worker.tokens_done or 0) / worker.num_tokens
    return MIDDLE[0] <= share <= MIDDLE[1]
