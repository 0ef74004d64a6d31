"""Told to stop: what fits is finished, the rest is given back, and in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bitnet_ext.wire.messages import HeartbeatAnswer
from bitnet_ext.wire.verdicts import ErrorCode, LeaseState, WorkerPhase
from tests.unit.worker.fleet import ENV, accepts
from tests.unit.worker.stand_in import HANG_UP, Reply, refuses, says
from worker.errors import StoppedError
from worker.heartbeat import Lease
from worker.process import end_now
from worker.shutdown import SIGNALS, Shutdown

PATIENCE_S = 60.0
BEAT = says(HeartbeatAnswer(lease=LeaseState.NONE, lease_s=0.0, heartbeat_s=5.0))


def test_before_the_signal_everything_fits() -> None:
    shutdown = Shutdown(30.0)

    shutdown.check()
    shutdown.check_fits(1e9)
    shutdown.check_fits(None)

    assert not shutdown.requested


def test_after_the_signal_only_what_ends_within_the_grace_fits() -> None:
    now = [100.0]
    shutdown = Shutdown(30.0, clock=lambda: now[0])
    shutdown.request()

    shutdown.check_fits(23.9)
    with pytest.raises(StoppedError, match="30 s of grace"):
        shutdown.check_fits(24.1)
    now[0] = 110.0
    shutdown.check_fits(13.9)
    with pytest.raises(StoppedError):
        shutdown.check_fits(14.1)
    with pytest.raises(StoppedError):
        shutdown.check_fits(None)
    with pytest.raises(StoppedError):
        shutdown.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_the_overrun_comes_before_the_end(
    handlers, number
) -> None:
    overrun = threading.Event()
    shutdown = Shutdown(0.01)
    shutdown.install(overrun.set)

    signal.raise_signal(number)

    assert shutdown.requested
    assert overrun.wait(PATIENCE_S)


def test_an_overrun_gives_the_task_back_and_ends_the_process(fleet) -> None:
    fleet.heartbeat.lease = Lease(fleet.task(), 100.0, fleet.clock)
    ends: list[int] = []

    end_now(fleet.settings, fleet.heartbeat, ends.append)

    (release,) = fleet.coordinator.asked("POST /tasks/t1/release")
    assert release.json()["lease_id"] == "0" * 32
    assert last_word(fleet) == ("stopping", None)
    assert ends == [0]


def test_a_goodbye_waits_for_the_heartbeat_that_is_on_its_way(fleet) -> None:
    on_its_way, goodbye, overtaken = threading.Event(), threading.Event(), []

    def hear(request) -> Reply:
        if request.json()["phase"] == WorkerPhase.STOPPING:
            goodbye.set()
        else:
            on_its_way.set()
            overtaken.append(goodbye.wait(0.2))
        return BEAT

    fleet.coordinator.on("POST /heartbeat", hear)
    fleet.heartbeat.lease = Lease(fleet.task(), 100.0, fleet.clock)
    fleet.heartbeat.interval_s = 0.01
    fleet.heartbeat.start()
    assert on_its_way.wait(PATIENCE_S)

    end_now(fleet.settings, fleet.heartbeat, lambda _: None)

    assert goodbye.is_set()
    assert overtaken == [False]


def test_an_overrun_without_a_task_says_nothing(fleet) -> None:
    ends: list[int] = []

    end_now(fleet.settings, fleet.heartbeat, ends.append)

    assert not fleet.coordinator.requests
    assert ends == [0]


@pytest.mark.parametrize("reply", [HANG_UP, refuses(409, ErrorCode.LEASE_LOST)])
def test_an_overrun_ends_the_process_whatever_is_answered(fleet, reply) -> None:
    fleet.coordinator.on("POST /tasks/t1/release", reply)
    fleet.heartbeat.lease = Lease(fleet.task(), 100.0, fleet.clock)
    ends: list[int] = []

    end_now(fleet.settings, fleet.heartbeat, ends.append)

    assert ends == [0]


def test_an_overrun_ends_the_process_even_by_a_bug(fleet) -> None:
    settings = replace(fleet.settings, worker_id=object())  # no JSON has such a thing
    fleet.heartbeat.lease = Lease(fleet.task(), 100.0, fleet.clock)
    ends: list[int] = []

    with pytest.raises(TypeError):
        end_now(settings, fleet.heartbeat, ends.append)

    assert ends == [0]


@pytest.fixture
def process(fleet, tmp_path) -> Iterator[subprocess.Popen[bytes]]:
    fleet.coordinator.on("POST /logs", Reply(204))
    started = subprocess.Popen(
        [sys.executable, "-m", "worker", "run"],
        env=os.environ
        | ENV
        | {
            "BITNET_COORDINATOR_URL": fleet.coordinator.url,
            "BITNET_HEALTH_BEACON": str(tmp_path / "alive"),
            "BITNET_CPU_THREADS": "1",
            "BITNET_SHUTDOWN_SECONDS": "20",
        },
        stderr=subprocess.PIPE,
    )
    yield started
    started.kill()
    started.communicate()


def test_a_real_worker_trains_submits_and_ends_well_on_sigterm(
    fleet, process, tmp_path
) -> None:
    taken = threading.Event()

    def take(request) -> Reply:
        taken.set()
        return accepts(request)

    fleet.coordinator.on("POST /gradient", take)
    fleet.hands_out(fleet.task())

    assert taken.wait(PATIENCE_S)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 0, log.decode()
    assert (tmp_path / "alive").exists()
    assert b'"event":"worker.stopped"' in log
    assert ENV["BITNET_WORKER_API_KEY"].encode() not in log
    assert fleet.coordinator.asked("POST /logs")
    ((meta, _),) = fleet.submissions()
    assert meta.loss_first > 0
    assert last_word(fleet) == ("stopping", None)


def test_a_real_worker_gives_back_what_it_holds_on_sigterm(fleet, process) -> None:
    def told_to_stop(_request) -> Reply:
        process.send_signal(signal.SIGTERM)
        return says(fleet.task())

    fleet.coordinator.on("POST /work", told_to_stop)

    _, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 0, log.decode()
    assert len(fleet.coordinator.asked("POST /tasks/t1/release")) == 1
    assert not fleet.submissions()
    assert last_word(fleet) == ("stopping", None)


def test_a_real_worker_that_can_not_go_on_says_no_goodbye(fleet, process) -> None:
    refused = refuses(401, ErrorCode.UNAUTHORIZED)

    def task_of_a_key_that_is_withdrawn(_request) -> Reply:
        for route in ("GET /weights/1", "POST /register", "POST /heartbeat"):
            fleet.coordinator.on(route, refused)
        return says(fleet.task(base_version=1, run_id="r2"))

    fleet.coordinator.on("POST /work", task_of_a_key_that_is_withdrawn)

    _, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 2, log.decode()
    assert fleet.coordinator.asked("POST /tasks/t1/release")
    assert "stopping" not in {
        said.json()["phase"] for said in fleet.coordinator.asked("POST /heartbeat")
    }


def last_word(fleet) -> tuple[str, str | None]:
    """Return phase and task of the last heartbeat."""
    said = fleet.coordinator.asked("POST /heartbeat")[-1].json()
    return said["phase"], said.get("task_id")
