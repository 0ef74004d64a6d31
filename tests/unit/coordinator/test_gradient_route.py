"""`POST /gradient` over a real connection: places, stalling, and a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import AsyncIterator
from typing import Any

from tornado.netutil import bind_sockets
from tornado.web import Application

from bitnet_ext.wire.messages import Task
from coordinator.api.base import Api, secret_hash
from coordinator.api.gradient import GradientHandler, Uploads
from coordinator.server import Server
from coordinator.store.blobs import BlobKind
from tests.unit.coordinator.fleets import World, body, frame

KEY = "k" * 40
TIMEOUT_S = 10.0
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def head(num_bytes: int, key: str = KEY) -> bytes:
    return (
        f"POST /gradient HTTP/1.1\r\nHost: x\r\nX-Api-Key: {key}\r\n"
        "Content-Type: application/octet-stream\r\n"
        f"Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


class Route:
    """The route alone, on a loopback port."""

    def __init__(self, world: World, uploads: Uploads) -> None:
        api = Api(
            fleet=world.fleet,
            feed=None,  # type: ignore[arg-type]  # this route looks at none of these
            lag=None,  # type: ignore[arg-type]
            key_hashes=[secret_hash(KEY)],
            metrics_hash=None,
            is_operator=None,  # type: ignore[arg-type]
        )
        self._uploads = uploads
        given = {"api": api, "uploads": uploads}
        self.server = Server(
            Application([("/gradient", GradientHandler, given)]), limit=50
        )
        self._sockets = bind_sockets(0, "127.0.0.1")
        self._port = self._sockets[0].getsockname()[1]
        self.server.add_sockets(self._sockets)

    async def until(self, *, taken: bool, num_waiting: int) -> None:
        """Return once all places are taken, and so many uploads wait for one."""
        while True:
            places = self._uploads._places
            found = (places.locked(), len(places._waiters or ()))
            if found == (taken, num_waiting):
                return
            await asyncio.sleep(0.01)

    async def send(self, *sent: bytes) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        for piece in sent:
            writer.write(piece)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def route(world: World, **limits: Any) -> AsyncIterator[Route]:
    found = Route(world, Uploads(**limits))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield found
    finally:
        await found.server.drain(0.0)


async def answer(connection: Connection) -> tuple[int, Any]:
    """Return status and JSON of the answer; close the connection."""
    reader, writer = connection
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    size = next(int(line[16:]) for line in lines if line.startswith("Content-Length: "))
    found = json.loads(await reader.readexactly(size))
    writer.close()
    return int(lines[0].split()[1]), found


def submission(world: World, task: Task) -> bytes:
    return body(world.meta(task), frame(task, 1.0))


def test_a_place_is_free_again_after_an_answer_a_refusal_and_a_broken_line(
    running: World,
) -> None:
    task = running.claimed()
    whole = submission(running, task)

    async def story() -> None:
        async with route(running, limit=1, place_s=0.0) as found:
            good = await answer(await found.send(head(len(whole)), whole))
            assert good[0] == 200, good
            bad = await answer(await found.send(head(4), b"\0\0\0\0"))
            assert bad[0] == 400, bad
            reader, writer = await found.send(head(len(whole)), whole[:50])
            busy = await answer(await found.send(head(len(whole)), whole))
            assert (busy[0], busy[1]["code"]) == (503, "busy")
            writer.transport.abort()
            del reader
            while True:  # until the server has seen it break
                again = await answer(await found.send(head(len(whole)), whole))
                if again[0] != 503:
                    break
            assert again == good  # the same submission gets the same answer

    running.do(story())


def test_an_upload_waits_for_a_place_and_who_hangs_up_meanwhile_takes_none(
    running: World,
) -> None:
    whole = submission(running, running.claimed())

    async def story() -> None:
        async with route(running, limit=1) as found:
            first = await found.send(head(len(whole)), whole[:50])
            await found.until(taken=True, num_waiting=0)
            _, hasty = await found.send(head(len(whole)))
            second = await found.send(head(len(whole)), whole)
            await found.until(taken=True, num_waiting=2)
            hasty.transport.abort()
            first[1].write(whole[50:])
            answers = [await answer(first), await answer(second)]
            assert answers[0] == answers[1] == (200, answers[0][1])
            late = await answer(await found.send(head(len(whole)), whole))
            assert late == answers[0]

    running.do(story())


def test_an_upload_that_stalls_gives_its_place_up(running: World) -> None:
    whole = submission(running, running.claimed())

    async def story() -> None:
        async with route(running, limit=1, stretch_s=0.1, stretch_bytes=10) as found:
            reader, stalled = await found.send(head(len(whole)), whole[:100])

            # Cut off, without an answer: nobody would listen.
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""

            late = await answer(await found.send(head(len(whole)), whole))
            assert late[0] == 200, late
            stalled.close()

    running.do(story())
    assert (
        len(running.fleet.blobs.names(BlobKind.PAYLOAD)) == 1
    )  # what arrived of the first one is gone


def test_a_slow_upload_that_gets_on_is_left_alone(running: World) -> None:
    whole = submission(running, running.claimed())

    async def story() -> None:
        async with route(running, limit=1, stretch_s=0.5, stretch_bytes=10) as found:
            reader, writer = await found.send(head(len(whole)), whole[:100])
            for at in range(100, len(whole), 500):
                await asyncio.sleep(0.15)
                writer.write(whole[at : at + 500])
                await writer.drain()
            assert (await answer((reader, writer)))[0] == 200

    running.do(story())


def test_a_disk_that_fills_up_in_mid_upload_is_an_answer_not_a_broken_line(
    running: World,
) -> None:
    whole = submission(running, running.claimed())

    async def story() -> None:
        async with route(running) as found:
            full = await answer(await found.send(head(len(whole)), whole))
            assert (full[0], full[1]["code"]) == (503, "disk_low")
            fine = await answer(await found.send(head(len(whole)), whole))
            assert fine[0] == 200

    # The first call makes the file, the second writes.
    with running.fs.failing(2, errno.ENOSPC):
        running.do(story())


def test_nobody_without_the_key_can_take_a_place(running: World) -> None:
    async def story() -> None:
        async with route(running, limit=1) as found:
            strangers = [
                await found.send(head(1000, key="x" * 40), b"") for _ in range(3)
            ]
            for stranger in strangers:
                assert (await answer(stranger))[0] == 401

    running.do(story())
