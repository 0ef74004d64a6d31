"""The websocket `/ws`: a snapshot, then numbered events; it takes no commands.

Each client has one task that drains its own backlog, so that a client that stops
reading delays nobody. Who may connect is decided by collaborators that come in
through the route; this file knows no password and no cookie.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from coordinator.domain.seams import Clock
from coordinator.live.hub import Hub, Mark, encode_message

log = logging.getLogger(__name__)

MAX_INBOUND_BYTES: Final = 4096
#: Messages that one client may send in one second.
MAX_INBOUND_PER_S: Final = 10

GOING_AWAY: Final = 1001
POLICY_VIOLATION: Final = 1008
SERVER_ERROR: Final = 1011
#: Our own: the page should show the login form.
SESSION_ENDED: Final = 4401

_RESYNC: Final = msgspec.json.encode({"kind": "resync"})


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one thing that a client may say."""

    want: Literal["snapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketLimits:
    """How long and how many; seconds unless named otherwise."""

    recheck_s: float = 60.0  #: how often the session is looked up again
    blocked_s: float = 60.0  #: longest wait for a client to take one message
    snapshot_gap_s: float = 1.0  #: least time between two snapshots of one client
    ping_s: float = 20.0
    max_clients: int = 500


class LiveClients:
    """The open websockets of this process."""

    def __init__(self) -> None:
        self._open: set[LiveSocket] = set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, client: LiveSocket) -> None:
        """Count a client that has connected."""
        self._open.add(client)

    def discard(self, client: LiveSocket) -> None:
        """Forget a client that has gone."""
        self._open.discard(client)

    def recheck(self) -> None:
        """Look every session up again now: one of them has just ended."""
        for client in self._open:
            client.recheck()

    def close_all(self) -> None:
        """Tell every client that this server stops."""
        for client in tuple(self._open):
            client.close(GOING_AWAY, "the coordinator stops")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFeed:
    """What the websocket works with."""

    hub: Hub
    #: Returns the body of a snapshot, as new as the events published so far.
    take_snapshot: Callable[[], Awaitable[object]]
    #: Returns who holds the session of a request, or None; keeps it not alive.
    current_operator: Callable[[RequestHandler], Awaitable[object | None]]
    #: Tells whether a Host header names this server.
    host_allowed: Callable[[str | None], bool]
    clock: Clock
    #: True where browsers reach this server by https, perhaps through a proxy.
    secure: bool = False
    limits: SocketLimits = SocketLimits()
    clients: LiveClients = field(default_factory=LiveClients)


class LiveSocket(WebSocketHandler):
    """One browser that watches."""

    # Tornado makes handlers through initialize(), not through a constructor.
    def initialize(self, feed: LiveFeed) -> None:
        """Take the collaborators of the route."""
        self._feed = feed
        self._recheck = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._snapshot_at = float("-inf")
        self._inbound_second = 0
        self._num_inbound = 0

    @property
    def ping_interval(self) -> float:
        """Seconds between pings; a client must answer each before the next."""
        return self._feed.limits.ping_s

    @property
    def max_message_size(self) -> int:
        """Bytes of the largest message taken from a client."""
        return MAX_INBOUND_BYTES

    def set_default_headers(self) -> None:
        """Say nothing about the server's software."""
        self.clear_header("Server")

    async def prepare(self) -> None:
        """Refuse a foreign host or page, a missing session, a full house.

        Raises HTTPError 421, 403, 401 or 503, in this order.
        """
        if not self._feed.host_allowed(self.request.headers.get("Host")):
            raise HTTPError(421)
        if not self._is_own_page():
            raise HTTPError(403)
        if await self._feed.current_operator(self) is None:
            raise HTTPError(401)
        if len(self._feed.clients) >= self._feed.limits.max_clients:
            raise HTTPError(503)

    def _is_own_page(self) -> bool:
        # Browsers always name the page's origin here, and pages cannot forge it;
        # Tornado alone would let a request without one pass.
        headers = self.request.headers
        scheme = "https" if self._feed.secure else self.request.protocol
        own = f"{scheme}://{headers.get('Host', '')}"
        return headers.get("Origin", "").lower() == own.lower()

    def open(self, *_args: str, **_kwargs: str) -> None:
        """Start to send."""
        self._feed.clients.add(self)
        self._backlog = self._feed.hub.subscribe()
        self._tasks = [
            asyncio.create_task(self._run(self._drain)),
            asyncio.create_task(self._run(self._watch_session)),
        ]

    def on_close(self) -> None:
        """Drop everything held for this client."""
        if not self._tasks:
            return  # it went away before it was let in
        self._feed.clients.discard(self)
        self._feed.hub.unsubscribe(self._backlog)
        for task in self._tasks:
            task.cancel()

    def recheck(self) -> None:
        """Look the session up now instead of at the next turn."""
        self._recheck.set()

    def on_message(self, message: str | bytes) -> None:
        """Take the wish for a snapshot; anything else ends the connection."""
        if self._is_flood():
            self.close(POLICY_VIOLATION, "too many messages")
            return
        try:
            msgspec.json.decode(message, type=Wish)
        except msgspec.MsgspecError:
            self.close(POLICY_VIOLATION, "not a message of the live feed")
            return
        self._backlog.want_snapshot()

    def _is_flood(self) -> bool:
        second = int(self._feed.clock.monotonic())
        if second != self._inbound_second:
            self._inbound_second, self._num_inbound = second, 0
        self._num_inbound += 1
        return self._num_inbound > MAX_INBOUND_PER_S

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run one of the two tasks; however it ends, the connection ends too."""
        try:
            await work()
        except (WebSocketClosedError, StreamClosedError):
            pass  # the client has gone; on_close tidies up
        except TimeoutError:
            log.warning(
                "a dashboard took no message for too long, closed",
                extra={"event": "live.client_blocked"},
            )
            self._hang_up()
        except Exception:
            log.exception(
                "the live feed of a dashboard failed",
                extra={"event": "live.client_failed"},
            )
            self.close(SERVER_ERROR, "server error")

    def _hang_up(self) -> None:
        # Without a close frame: it would wait behind what the client does not read.
        if self.ws_connection is not None and self.ws_connection.stream is not None:
            self.ws_connection.stream.close()

    async def _drain(self) -> None:
        """Send what waits, in order, as fast as this client takes it."""
        snapshot_seq = 0
        while True:
            item = await self._backlog.next()
            if item is Mark.SNAPSHOT:
                snapshot_seq = await self._send_snapshot()
            elif item is Mark.RESYNC:
                await self._send(_RESYNC)
            elif item.seq > snapshot_seq:
                await self._send(item.text)

    async def _send_snapshot(self) -> int:
        """Send a snapshot; return the number of the last event it covers."""
        clock = self._feed.clock
        due = self._snapshot_at + self._feed.limits.snapshot_gap_s
        await asyncio.sleep(max(0.0, due - clock.monotonic()))
        self._snapshot_at = clock.monotonic()
        # The number first: an event that falls between is then sent again rather
        # than lost.
        seq = self._feed.hub.seq
        body = await self._feed.take_snapshot()
        await self._send(encode_message("snapshot", seq, clock.now(), body))
        return seq

    async def _send(self, text: bytes) -> None:
        """Hand one message to the kernel; TimeoutError when the client is stuck."""
        async with asyncio.timeout(self._feed.limits.blocked_s):
            await self.write_message(text)

    async def _watch_session(self) -> None:
        """End the connection soon after its session has ended."""
        while await self._feed.current_operator(self) is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._feed.limits.recheck_s):
                    await self._recheck.wait()
            self._recheck.clear()
        self.close(SESSION_ENDED, "the session has ended")


def live_route(feed: LiveFeed) -> tuple[str, type[LiveSocket], dict[str, LiveFeed]]:
    """Return the row of the route table."""
    return (r"/ws", LiveSocket, {"feed": feed})
