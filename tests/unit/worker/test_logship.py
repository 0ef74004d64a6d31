"""Log records on their way to the coordinator: bounded, in order, never in the way."""

from __future__ import annotations

import logging
import random
import sys
import threading

import pytest

from bitnet_ext.wire.verdicts import ErrorCode
from tests.unit.worker.stand_in import HANG_UP, Reply, refuses
from worker.logship import BATCH_RECORDS, LogShipper
from worker.retry import Retry

OK = Reply(204)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def shipper(client, waits) -> LogShipper:
    retry = Retry(random.Random(0), waits.append)
    return LogShipper(client, "w1", retry, queue_records=500)


def record(
    number: int, level: int = logging.INFO, **extra: object
) -> logging.LogRecord:
    made = logging.LogRecord("worker", level, "x.py", 1, "line %d", (number,), None)
    vars(made).update(extra)
    return made


def shipped(coordinator) -> list[dict]:
    requests = coordinator.asked("POST /logs")
    return [line for request in requests for line in request.json()["records"]]


def test_records_arrive_in_order_in_batches(coordinator, shipper) -> None:
    coordinator.on("POST /logs", OK)
    for number in range(450):
        shipper.emit(record(number))

    shipper.flush_waiting()

    messages = [line["message"] for line in shipped(coordinator)]
    assert messages == [f"line {number}" for number in range(450)]
    sizes = [len(r.json()["records"]) for r in coordinator.requests]
    assert max(sizes) <= BATCH_RECORDS
    assert coordinator.requests[0].json()["worker_id"] == "w1"


def test_a_record_keeps_level_event_and_task_and_nothing_secret(
    coordinator, shipper
) -> None:
    coordinator.on("POST /logs", OK)
    shipper.emit(
        record(1, logging.WARNING, event="lease.lost", task_id="t1", api_key="secret")
    )
    shipper.emit(record(2, 25, task_id="not an id!"))
    shipper.emit(record(3, 5))

    shipper.flush_waiting()

    first, second, third = shipped(coordinator)
    assert (first["level"], first["event"]) == ("warning", "lease.lost")
    assert first["task_id"] == "t1"
    assert second["level"] == "info"
    assert "task_id" not in second
    assert third["level"] == "debug"
    assert b"secret" not in coordinator.requests[0].body


def test_a_traceback_is_part_of_the_message_and_everything_has_an_end(
    coordinator, shipper
) -> None:
    coordinator.on("POST /logs", OK)
    failed = record(1, logging.ERROR)
    try:
        raise ZeroDivisionError("deep down " + "x" * 20_000)
    except ZeroDivisionError:
        failed.exc_info = sys.exc_info()
    shipper.emit(failed)

    shipper.flush_waiting()

    (line,) = shipped(coordinator)
    assert "ZeroDivisionError: deep down" in line["message"]
    assert len(line["message"]) == 8000


def test_a_full_queue_drops_the_oldest_and_says_how_many(coordinator, shipper) -> None:
    coordinator.on("POST /logs", OK)
    for number in range(507):
        shipper.emit(record(number))

    shipper.flush_waiting()

    notice, *rest = shipped(coordinator)
    assert notice["event"] == "log.dropped"
    assert notice["message"].startswith("7 log records")
    assert rest[0]["message"] == "line 7"
    assert len(rest) == 500


def test_a_batch_is_sent_until_it_is_answered(coordinator, shipper, waits) -> None:
    coordinator.on("POST /logs", HANG_UP, refuses(503, ErrorCode.BUSY), OK)
    shipper.emit(record(1))

    shipper.flush_waiting()

    assert len(coordinator.requests) == 3
    assert len({request.body for request in coordinator.requests}) == 1
    assert waits


def test_a_refused_batch_is_counted_as_dropped(coordinator, shipper) -> None:
    coordinator.on("POST /logs", refuses(404, ErrorCode.UNKNOWN_WORKER), OK)
    shipper.emit(record(1))
    shipper.emit(record(2))

    shipper.flush_waiting()
    shipper.emit(record(3))
    shipper.flush_waiting()

    assert [line["message"] for line in shipped(coordinator)[2:]] == [
        "2 log records were dropped",
        "line 3",
    ]


def test_stopping_sends_the_rest_from_its_own_thread(coordinator, shipper) -> None:
    names = []

    def note(_request) -> Reply:
        names.extend(thread.name for thread in threading.enumerate())
        return OK

    coordinator.on("POST /logs", note)
    shipper.start()
    shipper.emit(record(1))

    shipper.stop(10.0)

    assert [line["message"] for line in shipped(coordinator)] == ["line 1"]
    assert "logship" in names


def test_stopping_what_was_never_started_is_nothing(shipper) -> None:
    shipper.emit(record(1))

    shipper.stop(10.0)


def test_what_the_shipper_itself_logs_is_not_shipped(coordinator, shipper) -> None:
    coordinator.on("POST /logs", HANG_UP, OK)
    logger = logging.getLogger("worker.retry")
    logger.addHandler(shipper)
    shipper.emit(record(1))
    thread = shipper._thread = threading.Thread(target=shipper.flush_waiting)

    thread.start()
    thread.join(10.0)

    logger.removeHandler(shipper)
    assert [line["message"] for line in shipped(coordinator)] == ["line 1"] * 2
