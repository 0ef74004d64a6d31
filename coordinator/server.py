"""The HTTP server: how many connections there may be, how long they may stall, the end.

Tornado bounds how long headers may take. The rest is here: bodies and readers that
stall are cut off, connections are counted below the limit of open files, and what is
in flight when the coordinator is told to stop is finished first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Awaitable
from typing import Any, Final

from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 2048
#: Each connection may send one file; database, logs and uploads need the rest.
_FILES_PER_CONNECTION: Final = 2
_OTHER_FILES: Final = 160
_MAX_HEADER_BYTES: Final = 16 * 1024
#: The body of a page's form. Routes that take more say so after they checked the key.
_MAX_BODY_BYTES: Final = 16 * 1024
#: How long a connection may wait for a request, and a request for its headers.
IDLE_S: Final = 60.0
#: How long a body may take to arrive; `POST /gradient` has a rule of its own.
BODY_S: Final = 20.0
#: How long the other side may take nothing of what is sent to it.
UNREAD_S: Final = 60.0


def allow_connections() -> int:
    """Raise this process's limit of open files as far as needed and allowed.

    Returns how many connections fit in.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wish = _OTHER_FILES + _FILES_PER_CONNECTION * MAX_CONNECTIONS
    files = wish if hard == resource.RLIM_INFINITY else min(wish, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(16, (files - _OTHER_FILES) // _FILES_PER_CONNECTION)


class Server(HTTPServer):
    """Tornado's server within bounds. `limit`: connections, `body_s` and `unread_s`."""

    def initialize(  # type: ignore[override]  # of Tornado's options, those we set
        self,
        request_callback: Any,
        *,
        limit: int,
        body_s: float = BODY_S,
        unread_s: float = UNREAD_S,
    ) -> None:
        """Stand in for the constructor, as Tornado's classes have it."""
        super().initialize(
            request_callback,
            max_header_size=_MAX_HEADER_BYTES,
            max_body_size=_MAX_BODY_BYTES,
            idle_connection_timeout=IDLE_S,
            body_timeout=body_s,
        )
        self._limit = limit
        self._unread_ms = round(1000 * unread_s)
        self._num_open = 0
        self._is_full = False
        #: Connections without a request under way, those that wait longest first.
        self._idle: dict[Any, None] = {}
        self._in_flight: set[object] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        """Take a connection in; where there are too many, an idle one makes room."""
        if self._num_open >= self._limit and not self._make_room():
            stream.close()
            return
        with contextlib.suppress(OSError):  # it has gone already
            stream.socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._unread_ms
            )
        self._num_open += 1
        super().handle_stream(stream, address)

    def _make_room(self) -> bool:
        if not self._is_full:
            self._is_full = True
            log.warning(
                "%d connections are open, the most there may be",
                self._num_open,
                extra={"event": "http.full"},
            )
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        oldest.stream.close()
        return True

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        """Note that a connection waits for its next request."""
        self._landed(server_conn)
        self._idle[server_conn] = None
        delegate = super().start_request(server_conn, request_conn)
        return _Request(self, server_conn, delegate)

    def on_close(self, server_conn: object) -> None:
        """Note that a connection has ended, or has become a websocket."""
        self._num_open -= 1
        self._is_full = self._is_full and self._num_open > self._limit // 2
        self._idle.pop(server_conn, None)
        self._landed(server_conn)
        super().on_close(server_conn)

    def begun(self, server_conn: object) -> None:
        """Note that a request is under way, unless its connection has ended."""
        if server_conn in self._idle:
            del self._idle[server_conn]
            self._in_flight.add(server_conn)
            self._quiet.clear()

    def _landed(self, server_conn: object) -> None:
        self._in_flight.discard(server_conn)
        if not self._in_flight:
            self._quiet.set()

    async def drain(self, seconds: float) -> None:
        """Take nothing new, give what is in flight this long, then close everything."""
        self.stop()
        for connection in list(self._idle):
            connection.stream.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._quiet.wait()
        await self.close_all_connections()


class _Request(HTTPMessageDelegate):
    """Tells the server when a request begins; all else goes on as it comes.

    It begins when a route has looked at its headers and let it in, or else when it is
    whole. Until then it is a stranger's, and makes room for others.
    """

    def __init__(
        self, server: Server, server_conn: object, to: HTTPMessageDelegate
    ) -> None:
        self._server = server
        self._server_conn = server_conn
        self._to = to

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        looked_at = self._to.headers_received(start_line, headers)
        return None if looked_at is None else self._begin_after(looked_at)

    async def _begin_after(self, looked_at: Awaitable[None]) -> None:
        await looked_at
        self._server.begun(self._server_conn)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._to.data_received(chunk)

    def finish(self) -> None:
        self._server.begun(self._server_conn)
        self._to.finish()

    def on_connection_close(self) -> None:
        self._to.on_connection_close()
