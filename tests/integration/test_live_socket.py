"""The websocket: who may connect, what arrives, and what a slow client costs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.live.hub import BACKLOG_MESSAGES
from coordinator.live.socket import (
    GOING_AWAY,
    MAX_INBOUND_BYTES,
    MAX_INBOUND_PER_S,
    POLICY_VIOLATION,
    SERVER_ERROR,
    SESSION_ENDED,
    SocketLimits,
)
from coordinator.login.sessions import IDLE_S
from tests.integration.page_server import (
    SESSION,
    TIMEOUT_S,
    Browser,
    PageServer,
    Watcher,
    page_server,
)

#: So large that a few dozen fill what the kernel keeps for a client.
BIG = {"text": "x" * 200_000}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with page_server(tmp_path, SocketLimits(snapshot_gap_s=0.0)) as running:
        yield running


@pytest.fixture
def operator(server: PageServer) -> Browser:
    browser = Browser(server)
    browser.log_in()
    return browser


def numbers(watcher: Watcher, count: int) -> list[int]:
    return [watcher.receive()["seq"] for _ in range(count)]


def test_a_snapshot_comes_first_and_then_numbered_events(
    server: PageServer, operator: Browser
) -> None:
    server.publish(count=5)

    with Watcher(operator) as watcher:
        first = watcher.receive()
        server.publish({"tasks": 3})
        second = watcher.receive()

    assert watcher.status == 101
    assert first["kind"] == "snapshot"
    assert first["seq"] == 5
    assert first["body"] == {"events": 5}
    assert abs(first["at"] - server.clock.now()) < 60
    assert second["kind"] == "fleet.updated"
    assert second["seq"] == 6
    assert second["body"] == {"tasks": 3}


def test_events_during_the_snapshot_are_sent_after_it_exactly_once(
    server: PageServer, operator: Browser
) -> None:
    started = threading.Event()
    gate = server.call(asyncio.Event)

    async def slow_snapshot() -> object:
        started.set()
        await gate.wait()
        return {}

    server.take_snapshot = slow_snapshot
    server.publish(count=2)
    with Watcher(operator) as watcher:
        assert started.wait(TIMEOUT_S)
        server.publish(count=3)
        server.call(gate.set)
        server.publish(count=1)

        assert numbers(watcher, 5) == [2, 3, 4, 5, 6]


def test_no_event_is_lost_or_doubled_however_snapshots_fall(
    server: PageServer, operator: Browser
) -> None:
    with Watcher(operator) as watcher:
        seq = watcher.receive()["seq"]
        for turn in range(300):
            server.publish()
            if turn % 7 == 0:
                server.clock.monotonic_ahead += 1  # or it would be a flood
                watcher.want_snapshot()
            if turn % 3:
                continue
            while seq < server.hub.seq:
                message = watcher.receive()
                if message["kind"] == "snapshot":
                    assert message["body"]["events"] >= message["seq"] >= seq
                else:
                    assert message["seq"] == seq + 1
                seq = message["seq"]


def test_a_stopped_client_is_told_to_resync_and_slows_nobody(
    server: PageServer, operator: Browser
) -> None:
    with Watcher(operator) as stopped, Watcher(operator) as reading:
        assert reading.receive()["kind"] == "snapshot"
        count = 3 * BACKLOG_MESSAGES
        for seq in range(1, count + 1):
            server.publish(BIG)
            assert reading.receive()["seq"] == seq

        # Now it reads again: an unbroken start, the mark, and nothing after it.
        assert stopped.receive()["kind"] == "snapshot"
        seen = 0
        while (message := stopped.receive())["kind"] != "resync":
            assert message["seq"] == seen + 1
            seen = message["seq"]
        assert message == {"kind": "resync"}
        assert 0 < seen < count - BACKLOG_MESSAGES

        server.publish()
        stopped.want_snapshot()
        assert stopped.receive()["seq"] == count + 1
        server.publish()
        assert numbers(stopped, 1) == numbers(reading, 2)[1:] == [count + 2]


class Signal(logging.Handler):
    """Set once a log line of one event has been written."""

    def __init__(self, event: str) -> None:
        super().__init__()
        self._event = event
        self.written = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.__dict__.get("event") == self._event:
            self.written.set()


def test_a_client_that_stays_stopped_is_hung_up_on(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    signal = Signal("live.client_blocked")
    logger = logging.getLogger("coordinator.live.socket")
    logger.addHandler(signal)
    request.addfinalizer(lambda: logger.removeHandler(signal))
    limits = SocketLimits(blocked_s=0.2, snapshot_gap_s=0.0)
    with page_server(tmp_path, limits) as server:
        operator = Browser(server)
        operator.log_in()
        with Watcher(operator) as stopped, Watcher(operator) as reading:
            assert reading.receive()["kind"] == "snapshot"
            for _ in range(3 * BACKLOG_MESSAGES):
                server.publish(BIG)
                reading.receive()

            assert signal.written.wait(TIMEOUT_S)
            stopped.read_to_the_end()

            server.publish()
            assert reading.receive()["seq"] == 3 * BACKLOG_MESSAGES + 1


def test_snapshots_are_rationed(tmp_path: Path) -> None:
    taken = []
    with page_server(tmp_path, SocketLimits(snapshot_gap_s=3600.0)) as server:
        operator = Browser(server)
        operator.log_in()

        async def count() -> object:
            taken.append(1)
            return {}

        server.take_snapshot = count
        with Watcher(operator) as watcher:
            assert watcher.receive()["kind"] == "snapshot"
            for _ in range(3):
                watcher.want_snapshot()
            watcher.ping()  # all three have been read

    assert len(taken) == 1


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"snapshot",
        b"{}",
        b'{"want":"password"}',
        b'{"want":"snapshot","also":1}',
        b'["want","snapshot"]',
        b"[" * 4000,
        b" " * MAX_INBOUND_BYTES,
    ],
)
def test_any_other_message_ends_the_connection(
    operator: Browser, message: bytes
) -> None:
    with Watcher(operator) as watcher:
        assert watcher.receive()["kind"] == "snapshot"

        watcher.send(message)

        assert watcher.receive() == POLICY_VIOLATION


def test_a_long_message_is_not_read(operator: Browser) -> None:
    with Watcher(operator) as watcher:
        assert watcher.receive()["kind"] == "snapshot"

        watcher.send(b" " * (MAX_INBOUND_BYTES + 1))

        assert watcher.receive() in (1009, None)


def test_a_flood_of_wishes_ends_the_connection(
    server: PageServer, operator: Browser
) -> None:
    moment = server.clock.monotonic()
    server.clock.monotonic = lambda: moment
    with Watcher(operator) as watcher:
        assert watcher.receive()["kind"] == "snapshot"

        for _ in range(MAX_INBOUND_PER_S + 1):
            watcher.want_snapshot()
        while isinstance(end := watcher.receive(), dict):
            assert end["kind"] == "snapshot"

        assert end == POLICY_VIOLATION


def test_compression_stays_off(operator: Browser) -> None:
    with Watcher(operator) as watcher:
        assert watcher.headers["Sec-WebSocket-Extensions"] is None


def test_without_a_session_nobody_may_watch(server: PageServer) -> None:
    stranger = Browser(server)
    with Watcher(stranger) as watcher:
        assert watcher.status == 401

    stranger.cookies[SESSION] = "A" * 43
    with Watcher(stranger) as watcher:
        assert watcher.status == 401

    assert server.call(lambda: len(server.feed.clients)) == 0


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "",
        "null",
        "http://evil.example",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost:{port}",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1:{port}.evil.example",
        "http://127.0.0.1:{port}/",
        "http://evil.example@127.0.0.1:{port}",
    ],
)
def test_a_page_of_another_origin_may_not_watch(
    server: PageServer, operator: Browser, origin: str | None
) -> None:
    named = None if origin is None else origin.format(port=server.port)

    with Watcher(operator, Origin=named) as watcher:
        assert watcher.status == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80"])
def test_a_foreign_host_may_not_watch(operator: Browser, host: str) -> None:
    with Watcher(operator, Host=host, Origin=f"http://{host}") as watcher:
        assert watcher.status == 421


@pytest.mark.parametrize("host", ["localhost:9999", "trainer.lan", "[::1]:7"])
def test_watching_works_through_a_tunnel(operator: Browser, host: str) -> None:
    with Watcher(operator, Host=host, Origin=f"http://{host}") as watcher:
        assert watcher.status == 101
        assert watcher.receive()["kind"] == "snapshot"


def test_behind_https_the_page_must_come_by_https(tmp_path: Path) -> None:
    with page_server(tmp_path, secure=True) as server:
        browser = Browser(server)
        host = f"127.0.0.1:{server.port}"
        with Watcher(browser, Origin=f"http://{host}") as watcher:
            assert watcher.status == 403
        with Watcher(browser, Origin=f"https://{host}") as watcher:
            assert watcher.status == 401  # past the origin; there is no session


def test_logout_closes_the_websocket_of_this_session_only(
    server: PageServer, operator: Browser
) -> None:
    other = Browser(server)
    other.log_in()
    with Watcher(operator) as watcher, Watcher(other) as kept:
        assert watcher.receive()["kind"] == "snapshot"
        assert kept.receive()["kind"] == "snapshot"

        operator.log_out()

        assert watcher.receive() == SESSION_ENDED
        server.publish()
        assert kept.receive()["seq"] == 1


def test_an_expired_session_closes_the_websocket(tmp_path: Path) -> None:
    with page_server(tmp_path, SocketLimits(recheck_s=0.05)) as server:
        operator = Browser(server)
        operator.log_in()
        with Watcher(operator) as watcher:
            assert watcher.receive()["kind"] == "snapshot"

            server.clock.wall_ahead = IDLE_S

            assert watcher.receive() == SESSION_ENDED


def test_a_full_house_is_said_so(tmp_path: Path) -> None:
    with page_server(tmp_path, SocketLimits(max_clients=1)) as server:
        operator = Browser(server)
        operator.log_in()
        with Watcher(operator) as first:
            assert first.receive()["kind"] == "snapshot"
            with Watcher(operator) as second:
                assert second.status == 503


def test_a_client_that_leaves_is_forgotten(
    server: PageServer, operator: Browser
) -> None:
    with Watcher(operator) as watcher, Watcher(operator) as other:
        assert other.receive()["kind"] == "snapshot"
        watcher.send(b"\x03\xe8", opcode=0x8)
        while watcher.receive() is not None:
            pass

        assert server.call(lambda: len(server.feed.clients)) == 1


def test_a_snapshot_that_fails_ends_the_connection_and_is_logged(
    server: PageServer, operator: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> object:
        raise RuntimeError("no such table")

    server.take_snapshot = broken
    with Watcher(operator) as watcher:
        assert watcher.receive() == SERVER_ERROR

    assert "no such table" in caplog.text


def test_clients_are_told_when_the_server_stops(tmp_path: Path) -> None:
    with page_server(tmp_path) as server:
        operator = Browser(server)
        operator.log_in()
        watcher = Watcher(operator)
        assert watcher.receive()["kind"] == "snapshot"

    with watcher:
        assert watcher.receive() == GOING_AWAY


def test_a_client_that_answers_no_ping_is_let_go(tmp_path: Path) -> None:
    with page_server(tmp_path, SocketLimits(ping_s=0.1)) as server:
        operator = Browser(server)
        operator.log_in()
        with Watcher(operator) as watcher:
            assert watcher.receive()["kind"] == "snapshot"
            watcher.await_ping()
            assert watcher.receive() == 1000
