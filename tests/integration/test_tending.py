"""An operator takes a real worker out of a real fleet and lets it work again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from coordinator.cli import NOT_RUNNING
from coordinator.control import Seed
from coordinator.service.telemetry import Telemetry
from tests.integration.fleet import (
    KEY,
    ROOT,
    CoordinatorProcess,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)

SETTINGS = {"ROUND_S": 2, "EVALUATE_EVERY": 1000, "WARMUP_TOKENS": 0}


def ordered(process: CoordinatorProcess, *order: str) -> tuple[int, str]:
    """Run `bitnet-coordinator` as a process of its own; return status and output."""
    folders = ["--data", str(process.data), "--corpus", str(process.data / "../corpus")]
    done = subprocess.run(
        [sys.executable, "-m", "coordinator", *order, *folders],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    return done.returncode, done.stdout or done.stderr


def row_of(process: CoordinatorProcess, name: str) -> Any:
    """Return what is shown of a worker, or of nobody while it has not registered."""
    rows = {row["worker_id"]: row for row in process.status()["workers"]}
    return rows.get(name, {"tasks_done": 0, "verdict": None})


def claims_of(process: CoordinatorProcess, name: str) -> int:
    ((count,),) = process.rows("SELECT count(*) FROM claims WHERE worker_id = ?", name)
    return int(count)


def test_a_worker_is_drained_put_away_and_taken_back(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", num_files=60, words=300)
    with coordinator(tmp_path, **SETTINGS) as process:
        process.tell(Seed())
        with workers(tmp_path, process.url, "alder", "birch") as (alder, _birch):
            for name in ("alder", "birch"):
                wait_for(name, lambda n=name: row_of(process, n)["tasks_done"])

            drained = ordered(process, "drain-worker", "alder")
            assert drained[0] == 0
            assert drained[1].startswith("worker alder gets no more tasks")
            wait_for("an empty worker", lambda: _is_empty(row_of(process, "alder")))
            before = claims_of(process, "alder"), claims_of(process, "birch")
            wait_for("birch alone", lambda: claims_of(process, "birch") > before[1] + 1)
            assert claims_of(process, "alder") == before[0]
            status, shown = ordered(process, "status")
            assert status == 0
            assert any(line.startswith("draining") for line in shown.splitlines())

            assert ordered(process, "mark-gone", "alder")[0] == 0
            alder.send_signal(signal.SIGTERM)
            alder.wait(60.0)
            assert row_of(process, "alder")["verdict"] == "gone"
        with workers(tmp_path, process.url, "alder"):
            wait_for("alder", lambda: row_of(process, "alder")["verdict"] == "draining")
            assert claims_of(process, "alder") == before[0]

            assert ordered(process, "resume-worker", "alder")[0] == 0
            wait_for("a task", lambda: claims_of(process, "alder") > before[0])

        status, dump = ordered(process, "dump-telemetry")
        told = msgspec.json.decode(dump, type=Telemetry)
        assert (status, told.running) == (0, True)
        kinds = {event.kind for event in told.events}
        assert {"worker.drained", "worker.gone", "worker.returned"} <= kinds
        assert KEY not in dump
        process.stop()
        assert ordered(process, "status")[0] == NOT_RUNNING


def test_a_worker_that_is_stopped_is_gone_not_lost(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path, EVALUATE_EVERY=1000) as process:
        process.tell(Seed(tokens=1024))
        with workers(tmp_path, process.url, "w1"):
            process.wait_for_version(2)

        row = row_of(process, "w1")

        assert (row["verdict"], row["evidence"][:8]) == ("gone", "Stopped.")
        assert process.status()["tasks"]["leased"] == 0


def _is_empty(row: Any) -> bool:
    return bool(row["verdict"] == "draining" and row["task_id"] is None)
