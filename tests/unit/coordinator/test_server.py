"""The HTTP server: bounds on connections and on stalling, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, stream_request_body

from coordinator.server import MAX_CONNECTIONS, Server, allow_connections

TIMEOUT_S = 10.0
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = HEALTH.replace(b"health", b"slow")
BIG = HEALTH.replace(b"health", b"big")
HALF_A_BODY = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"
HALF_A_STREAM = b"POST /stream HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nabc"
CLOSING = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


class Health(RequestHandler):
    async def get(self) -> None:
        self.finish("alive")

    async def post(self) -> None:
        self.finish("never")


class Slow(RequestHandler):
    def initialize(self, **events: asyncio.Event) -> None:
        self.events = events

    async def get(self) -> None:
        self.events["begun"].set()
        await self.events["may_end"].wait()
        self.finish("done at last")


@stream_request_body
class Stream(Slow):
    def initialize(self, **events: asyncio.Event) -> None:
        super().initialize(**events)
        self.got = b""

    async def prepare(self) -> None:
        self.events["begun"].set()

    def data_received(self, chunk: bytes) -> None:
        self.got += chunk

    async def post(self) -> None:
        self.finish(self.got)


class Big(Slow):
    async def get(self) -> None:
        with contextlib.suppress(StreamClosedError):
            for _ in range(64):
                self.write(b"x" * (1 << 20))
                await self.flush()
        self.events["begun"].set()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    """A server on a loopback port."""

    def __init__(self, **limits: Any) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        events = {"begun": self.begun, "may_end": self.may_end}
        routes = [
            ("/health", Health),
            ("/slow", Slow, events),
            ("/big", Big, events),
            ("/stream", Stream, events),
        ]
        self.server = Server(Application(routes), **{"limit": 50, **limits})
        self._sockets = bind_sockets(0, "127.0.0.1")
        self.port = self._sockets[0].getsockname()[1]
        self.server.add_sockets(self._sockets)

    async def connect(self, *sent: bytes) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for piece in sent:
            writer.write(piece)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def site(**limits: Any) -> AsyncIterator[Site]:
    found = Site(**limits)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield found
    finally:
        await found.server.drain(0.0)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await story()

    asyncio.run(whole())


async def ends(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes until the other side closes."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def test_a_body_that_stalls_is_cut_off() -> None:
    async def story() -> None:
        async with site(body_s=0.1) as found:
            reader, writer = await found.connect(HALF_A_BODY)
            assert await ends(reader) == b""
            writer.close()

    run(story)


def test_an_idle_connection_makes_room_for_a_new_one() -> None:
    async def story() -> None:
        async with site(limit=3) as found:
            idle = [await found.connect(HEALTH) for _ in range(3)]
            for reader, _writer in idle:
                await reader.readuntil(b"alive")

            newest, writer = await found.connect(HEALTH)

            assert (await newest.readuntil(b"alive")).startswith(b"HTTP/1.1 200")
            assert await ends(idle[0][0]) == b""  # the one that waits longest
            idle[2][1].write(HEALTH)
            await idle[2][0].readuntil(b"alive")
            for _reader, each in [*idle, (newest, writer)]:
                each.close()

    run(story)


def test_requests_in_flight_are_not_cut_off_for_a_new_connection() -> None:
    async def story() -> None:
        async with site(limit=1) as found:
            reader, writer = await found.connect(SLOW)
            await found.begun.wait()

            refused, other = await found.connect(HEALTH)

            assert await ends(refused) == b""
            found.may_end.set()
            assert await reader.readuntil(b"done at last")
            other.close()
            writer.close()

    run(story)


def test_a_half_sent_body_makes_room_for_a_new_connection() -> None:
    async def story() -> None:
        async with site(limit=1) as found:
            stalled, other = await found.connect(HALF_A_BODY)

            reader, writer = await found.connect(HEALTH)

            assert await reader.readuntil(b"alive")
            assert await ends(stalled) == b""
            other.close()
            writer.close()

    run(story)


def test_a_body_whose_sender_was_let_in_is_not_cut_off_for_others() -> None:
    async def story() -> None:
        async with site(limit=1) as found:
            reader, writer = await found.connect(HALF_A_STREAM)
            await found.begun.wait()

            refused, other = await found.connect(HEALTH)

            assert await ends(refused) == b""
            writer.write(b"def")
            assert await reader.readuntil(b"abcdef")
            other.close()
            writer.close()

    run(story)


def test_every_connection_that_ends_leaves_its_place() -> None:
    async def story() -> None:
        async with site(limit=2) as found:
            for _ in range(5):
                reader, writer = await found.connect(CLOSING)
                await ends(reader)
                writer.close()
            busy = []
            for _ in range(2):
                busy.append(await found.connect(SLOW))
                await found.begun.wait()
                found.begun.clear()

            # Both places are taken, and no third one has come from anywhere.
            refused, other = await found.connect(HEALTH)

            assert await ends(refused) == b""
            found.may_end.set()
            for reader, writer in busy:
                assert await reader.readuntil(b"done at last")
                writer.close()
            other.close()

    run(story)


def test_many_half_sent_bodies_leave_the_server_answering() -> None:
    async def story() -> None:
        async with site(limit=20, body_s=0.2) as found:
            stalled = [await found.connect(HALF_A_BODY) for _ in range(60)]
            for reader, _writer in stalled:
                await ends(reader)

            reader, writer = await found.connect(HEALTH)

            assert await reader.readuntil(b"alive")
            for _reader, each in [*stalled, (reader, writer)]:
                each.close()

    run(story)


def test_the_end_waits_for_what_is_in_flight_and_for_nothing_else() -> None:
    async def story() -> None:
        async with site() as found:
            idle, idle_writer = await found.connect()
            slow, slow_writer = await found.connect(SLOW)
            await found.begun.wait()

            ended = asyncio.create_task(found.server.drain(TIMEOUT_S))

            assert await ends(idle) == b""
            assert not ended.done()
            found.may_end.set()
            assert b"done at last" in await ends(slow)
            await ended
            idle_writer.close()
            slow_writer.close()

    run(story)


def test_the_end_does_not_wait_for_ever() -> None:
    async def story() -> None:
        async with site() as found:
            slow, writer = await found.connect(SLOW)
            await found.begun.wait()
            await found.server.drain(0.05)
            assert await ends(slow) == b""
            found.may_end.set()
            writer.close()

    run(story)


@pytest.mark.slow
def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    async def story() -> None:
        async with site(unread_s=0.5) as found:
            _reader, writer = await found.connect(BIG)
            writer.transport.pause_reading()
            # Nothing but the time limit ends this, far from its last byte.
            await found.begun.wait()
            writer.transport.abort()

    run(story)


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "files"),
    [(256, 1000, 420, 1000), (1000, 1000, 420, 1000), (64, 64, 16, 64)],
)
def test_the_limit_of_open_files_is_raised_as_far_as_allowed(
    soft: int, hard: int, connections: int, files: int
) -> None:
    program = (
        "import resource; from coordinator.server import allow_connections;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "print(allow_connections(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(connections), str(files)]


def test_no_more_connections_are_taken_than_are_good() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert allow_connections() <= MAX_CONNECTIONS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
