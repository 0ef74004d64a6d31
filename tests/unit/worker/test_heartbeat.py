"""Heartbeats, the lease they renew, and the beacon that follows progress."""

from __future__ import annotations

import threading

import pytest

from bitnet_ext.wire.messages import MAX_HEARTBEAT_S, HeartbeatAnswer
from bitnet_ext.wire.verdicts import ErrorCode, LeaseState, WorkerPhase
from tests.unit.worker.shapes import a_task
from tests.unit.worker.stand_in import HANG_UP, Reply, refuses, says
from worker.errors import LeaseLostError
from worker.heartbeat import MIN_INTERVAL_S, Heartbeat, Lease


def answer(**changes) -> Reply:
    fields = {"lease": LeaseState.HELD, "lease_s": 60.0, "heartbeat_s": 5.0}
    return says(HeartbeatAnswer(**(fields | changes)))


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def heartbeat(client, now, tmp_path) -> Heartbeat:
    return Heartbeat(
        client, "w1", tmp_path / "alive", clock=lambda: now[0], cpu_s=lambda: 12.5
    )


@pytest.fixture
def lease(now) -> Lease:
    return Lease(a_task(64), 100.0, lambda: now[0])


def lit(heartbeat: Heartbeat, tmp_path) -> bool:
    """Beat once and say whether the beacon was touched."""
    (tmp_path / "alive").unlink(missing_ok=True)
    heartbeat.beat()
    return (tmp_path / "alive").exists()


def test_a_beat_says_what_is_held_and_how_far_it_is(
    coordinator, heartbeat, lease
) -> None:
    coordinator.on("POST /heartbeat", answer())
    heartbeat.lease, heartbeat.phase = lease, WorkerPhase.TRAINING
    lease.took_bytes(70)
    lease.took_bytes(7)
    lease.took_step(32, 1.5)

    heartbeat.beat()

    assert coordinator.requests[0].json() == {
        "worker_id": "w1",
        "phase": "training",
        "task_id": "t1",
        "lease_id": "0" * 32,
        "tokens_done": 32,
        "bytes_done": 77,
        "cpu_s": 12.5,
        "step_s": 1.5,
    }


def test_a_beat_without_a_lease_names_none(coordinator, heartbeat) -> None:
    coordinator.on("POST /heartbeat", answer(lease=LeaseState.NONE))

    heartbeat.beat()

    assert coordinator.requests[0].json().keys() >= {"worker_id", "phase"}
    assert "lease_id" not in coordinator.requests[0].json()


def test_a_lease_ends_so_long_after_the_request_for_it(lease, now) -> None:
    now[0] = 159.9
    lease.check()
    now[0] = 160.0

    with pytest.raises(LeaseLostError, match="t1 is not ours"):
        lease.check()
    assert not lease.denied


def test_a_claim_that_was_answered_late_ends_as_early_all_the_same(now) -> None:
    now[0] = 140.0  # asked at 100, answered now

    lease = Lease(a_task(64), 100.0, lambda: now[0])

    now[0] = 159.9
    assert not lease.lost
    now[0] = 160.0
    assert lease.lost


def test_a_beat_renews_from_the_moment_it_was_sent(
    coordinator, heartbeat, lease, now
) -> None:
    def slow(_request) -> Reply:
        now[0] = 140.0
        return answer()

    coordinator.on("POST /heartbeat", slow)
    heartbeat.lease = lease
    now[0] = 130.0

    heartbeat.beat()

    now[0] = 189.9
    lease.check()
    now[0] = 190.0
    assert lease.lost


def test_an_answer_that_was_overtaken_shortens_nothing(lease, now) -> None:
    lease.renew(150.0, 60.0)
    lease.renew(110.0, 60.0)
    now[0] = 200.0

    lease.check()


@pytest.mark.parametrize("state", [LeaseState.LOST, LeaseState.NONE])
def test_a_lease_that_the_coordinator_does_not_know_is_lost(
    coordinator, heartbeat, lease, state
) -> None:
    coordinator.on("POST /heartbeat", answer(lease=state))
    heartbeat.lease = lease

    heartbeat.beat()

    assert lease.denied
    assert lease.lost


@pytest.mark.parametrize("reply", [HANG_UP, refuses(503, ErrorCode.BUSY)])
def test_a_beat_without_an_answer_changes_nothing(
    coordinator, heartbeat, lease, reply
) -> None:
    coordinator.on("POST /heartbeat", reply)
    heartbeat.lease = lease

    heartbeat.beat()

    assert not lease.lost


def test_the_answer_sets_drain_and_interval(coordinator, heartbeat) -> None:
    coordinator.on(
        "POST /heartbeat",
        answer(lease=LeaseState.NONE, drain=True, heartbeat_s=7.0),
        answer(lease=LeaseState.NONE, heartbeat_s=0.0),
        answer(lease=LeaseState.NONE, heartbeat_s=1e300),
    )

    heartbeat.beat()
    assert (heartbeat.draining, heartbeat.interval_s) == (True, 7.0)

    heartbeat.beat()
    assert (heartbeat.draining, heartbeat.interval_s) == (False, MIN_INTERVAL_S)

    heartbeat.beat()
    assert heartbeat.interval_s == MAX_HEARTBEAT_S


def test_the_beacon_follows_tokens_and_bytes_not_beats(
    coordinator, heartbeat, lease, tmp_path
) -> None:
    coordinator.on("POST /heartbeat", answer())
    heartbeat.lease = lease

    assert not lit(heartbeat, tmp_path)
    lease.took_bytes(1)
    assert lit(heartbeat, tmp_path)
    assert not lit(heartbeat, tmp_path)
    lease.took_step(16, 1.0)
    assert lit(heartbeat, tmp_path)
    assert not lit(heartbeat, tmp_path)


def test_the_beacon_follows_a_new_task_from_its_first_bytes(
    coordinator, heartbeat, lease, now, tmp_path
) -> None:
    coordinator.on("POST /heartbeat", answer())
    heartbeat.lease = lease
    lease.took_bytes(1000)
    lease.took_step(64, 1.0)
    assert lit(heartbeat, tmp_path)

    heartbeat.lease = Lease(a_task(64), 100.0, lambda: now[0])
    heartbeat.lease.took_bytes(1)

    assert lit(heartbeat, tmp_path)


def test_training_lights_the_beacon_though_nobody_answers(
    coordinator, heartbeat, lease, tmp_path
) -> None:
    coordinator.on("POST /heartbeat", HANG_UP)
    heartbeat.lease = lease
    lease.took_step(16, 1.0)

    assert lit(heartbeat, tmp_path)


def test_an_idle_worker_is_alive_when_it_is_answered(
    coordinator, heartbeat, tmp_path
) -> None:
    coordinator.on("POST /heartbeat", HANG_UP, answer(lease=LeaseState.NONE))
    heartbeat.phase = WorkerPhase.IDLE

    assert not lit(heartbeat, tmp_path)
    assert lit(heartbeat, tmp_path)
    heartbeat.phase = WorkerPhase.STARTING
    assert not lit(heartbeat, tmp_path)


def test_a_beacon_that_cannot_be_written_is_logged(client, tmp_path, caplog) -> None:
    Heartbeat(client, "w1", tmp_path / "gone" / "alive").light()

    assert [record.event for record in caplog.records] == ["beacon.failed"]


def test_it_beats_in_a_thread_of_its_own_until_it_is_stopped(
    coordinator, heartbeat
) -> None:
    threads, second = [], threading.Event()

    def note(_request) -> Reply:
        threads.extend(t for t in threading.enumerate() if t.name == "heartbeat")
        if len(threads) == 2:
            second.set()
        return answer(lease=LeaseState.NONE, heartbeat_s=0.0)

    coordinator.on("POST /heartbeat", note)
    heartbeat.interval_s = 0.01

    heartbeat.start()
    assert second.wait(10.0)
    heartbeat.stop()

    threads[0].join(10.0)
    assert not threads[0].is_alive()


def test_a_beat_that_fails_for_a_reason_nobody_thought_of_is_not_the_last(
    coordinator, client, tmp_path
) -> None:
    beats, second = [], threading.Event()

    def cpu_s() -> float:
        beats.append(1)
        if len(beats) == 2:
            second.set()
        raise OSError("no such clock")

    heartbeat = Heartbeat(client, "w1", tmp_path / "alive", cpu_s=cpu_s)
    heartbeat.interval_s = 0.01

    heartbeat.start()

    assert second.wait(10.0)
    heartbeat.stop()
