"""The pages and the live feed on a real server, with a browser and a raw watcher.

The server runs on a thread of its own, so that a test is plain blocking code. Every
wait has a time-out.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import cache, partial
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from argon2 import PasswordHasher
from sqlalchemy import func, select
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from coordinator.live.hub import Hub
from coordinator.live.socket import LiveFeed, SocketLimits, live_route
from coordinator.login.door import Door
from coordinator.login.handlers import Site, page_routes, page_settings
from coordinator.login.hosts import host_allowed
from coordinator.store.engine import Store
from coordinator.store.sessions import keep_password_hash
from coordinator.store.system import SystemRng
from coordinator.store.tables import metadata, secrets, sessions

T = TypeVar("T")

SESSION = "bitnet_session_one"
PASSWORD = "a right password"
ALLOWED_HOSTS = frozenset({"trainer.lan"})
TIMEOUT_S = 20.0
LOGIN_HTML = """<form method="post" action="/login">
<input name="_xsrf" value="{{ xsrf }}"><p id="error">{{ error }}</p>
<input name="next" value="{{ next_path }}"></form>"""
DASHBOARD_HTML = """<title>dashboard</title>
<form action="/logout"><input name="_xsrf" value="{{ xsrf }}"></form>"""


@cache
def _password_hash() -> str:
    # A hash says what it costs; the usual price, for each login, would take minutes.
    return PasswordHasher(time_cost=1, memory_cost=64).hash(PASSWORD)


class MovableClock:
    """Real time, plus what a test adds to it."""

    def __init__(self) -> None:
        self.wall_ahead = 0.0
        self.monotonic_ahead = 0.0
        #: Where the monotonic clock stands still, if it does.
        self.monotonic_at: float | None = None

    def now(self) -> float:
        return time.time()

    def wall(self) -> float:
        return time.time() + self.wall_ahead

    def monotonic(self) -> float:
        if self.monotonic_at is not None:
            return self.monotonic_at
        return time.monotonic() + self.monotonic_ahead


class PageServer:
    """One server on a loopback port; `call` runs a function on its loop."""

    def __init__(
        self, folder: Path, limits: SocketLimits, secure: bool, mark: str
    ) -> None:
        self._mark = mark
        self.store = Store(folder / "fleet.db")
        self.store.write_now(lambda c: metadata.create_all(c, [sessions, secrets]))
        self.store.write_now(lambda c: keep_password_hash(c, _password_hash()))
        self.clock = MovableClock()
        #: Seconds that each login had to wait, in order; nobody really waits.
        self.pauses: list[float] = []
        self.hub = Hub()
        self.take_snapshot: Callable[[], Awaitable[object]] = self._count_events
        self._webui = _make_webui(folder / "webui")
        self._limits = limits
        self._secure = secure
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _note_pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def _count_events(self) -> object:
        return {"events": self.hub.seq}

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        door = Door(
            self.store,
            self.clock,
            SystemRng(),
            secure=self._secure,
            mark=self._mark,
            pause=self._note_pause,
        )
        site = Site(door=door, allowed_hosts=ALLOWED_HOSTS, webui_folder=self._webui)
        self.feed = LiveFeed(
            hub=self.hub,
            take_snapshot=lambda: self.take_snapshot(),
            current_operator=door.watching_operator,
            host_allowed=partial(host_allowed, allowed=ALLOWED_HOSTS),
            clock=self.clock,
            secure=self._secure,
            limits=self._limits,
        )
        door.on_logout(self.feed.clients.recheck)
        routes: list[Any] = [*page_routes(site), live_route(self.feed)]
        server = HTTPServer(Application(routes, **page_settings(secure=self._secure)))
        sockets = bind_sockets(0, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        server.add_sockets(sockets)
        self._started.set()
        await self._stop.wait()
        self.feed.clients.close_all()
        server.stop()
        await server.close_all_connections()

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.store.close()

    def call(self, act: Callable[[], T]) -> T:
        async def run() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(TIMEOUT_S)

    def publish(self, body: object = None, count: int = 1) -> None:
        """Publish events as numbered by the hub."""

        def act() -> None:
            for _ in range(count):
                self.hub.publish("fleet.updated", body or {}, self.clock.now())

        self.call(act)

    def num_sessions(self) -> int:
        query = select(func.count()).select_from(sessions)
        return self.store.read_now(lambda c: c.execute(query).scalar_one())


@contextlib.contextmanager
def page_server(
    folder: Path,
    limits: SocketLimits | None = None,
    *,
    secure: bool = False,
    mark: str = "one",
) -> Iterator[PageServer]:
    """Run a server as long as the block runs."""
    folder.mkdir(exist_ok=True)
    server = PageServer(folder, limits or SocketLimits(), secure, mark)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _make_webui(folder: Path) -> Path:
    (folder / "css").mkdir(parents=True)
    (folder / "login.html").write_text(LOGIN_HTML)
    (folder / "dashboard.html").write_text(DASHBOARD_HTML)
    (folder / "css" / "app.css").write_text("body { color: black }")
    (folder / "private.txt").write_text("not for everybody")
    return folder


class Answer:
    """An HTTP answer, read whole."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()
        self.cookies = SimpleCookie()
        for line in self.headers.get_all("Set-Cookie") or []:
            self.cookies.load(line)


class Browser:
    """Keeps cookies, follows no redirects."""

    def __init__(self, server: PageServer) -> None:
        self.server = server
        self.cookies: dict[str, str] = {}

    def get(self, path: str, **headers: str | None) -> Answer:
        return self._send("GET", path, None, headers)

    def post(self, path: str, form: dict[str, str], **headers: str | None) -> Answer:
        return self._send("POST", path, urlencode(form), headers)

    def _send(
        self, method: str, path: str, body: str | None, headers: dict[str, str | None]
    ) -> Answer:
        sent: dict[str, str | None] = {
            "Host": f"127.0.0.1:{self.server.port}",
            "Cookie": self.cookie_header() or None,
            "Content-Type": "application/x-www-form-urlencoded",
            "Content-Length": str(len(body or "")),
            **headers,
        }
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.server.port, timeout=TIMEOUT_S
        )
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders((body or "").encode())
            answer = Answer(connection.getresponse())
        for name, morsel in answer.cookies.items():
            self.cookies[name] = morsel.value
        return answer

    def cookie_header(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items())

    def xsrf(self) -> str:
        """Return the token of the login form, and take its cookie."""
        if "bitnet_xsrf" not in self.cookies:
            self.get("/login")
        return self.cookies["bitnet_xsrf"]

    def log_in(self, password: str = PASSWORD, next_path: str = "") -> Answer:
        form = {"_xsrf": self.xsrf(), "password": password}
        return self.post("/login", form | ({"next": next_path} if next_path else {}))

    def log_out(self) -> Answer:
        return self.post("/logout", {"_xsrf": self.xsrf()})


class Watcher:
    """A websocket client on a raw socket; it reads only when told to."""

    def __init__(self, browser: Browser, **headers: str | None) -> None:
        host = f"127.0.0.1:{browser.server.port}"
        sent: dict[str, str | None] = {
            "Host": host,
            "Origin": f"http://{host}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Extensions": "permessage-deflate",
            "Cookie": browser.cookie_header() or None,
            **headers,
        }
        self._socket = socket.create_connection(
            ("127.0.0.1", browser.server.port), timeout=TIMEOUT_S
        )
        lines = [
            f"{name}: {value}" for name, value in sent.items() if value is not None
        ]
        request = "\r\n".join(["GET /ws HTTP/1.1", *lines, "", ""])
        self._socket.sendall(request.encode())
        self._file = self._socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        self.headers = http.client.parse_headers(self._file)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()
        self._socket.close()

    def receive(self) -> Any:
        """Return the next message; the number of a close frame; None at the end."""
        while True:
            opcode, payload = self._receive_frame()
            if opcode is None:
                return None
            if opcode == 0x8:
                return struct.unpack(">H", payload[:2])[0]
            if opcode == 0x1:
                return json.loads(payload)

    def _receive_frame(self) -> tuple[int | None, bytes]:
        head = self._file.read(2)
        if len(head) < 2:
            return None, b""
        length = head[1]
        if length == 126:
            length = int.from_bytes(self._file.read(2))
        elif length == 127:
            length = int.from_bytes(self._file.read(8))
        return head[0] & 0xF, self._file.read(length)

    def read_to_the_end(self) -> None:
        """Return once the server has closed the connection."""
        self._file.read()

    def send(self, message: bytes, opcode: int = 0x1) -> None:
        mask = b"\0\0\0\0"
        if len(message) < 126:
            head = struct.pack(">BB", 0x80 | opcode, 0x80 | len(message))
        else:
            head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, len(message))
        self._socket.sendall(head + mask + message)

    def ping(self) -> None:
        """Return once the server has read all that was sent before."""
        self.send(b"", opcode=0x9)
        while self._receive_frame()[0] != 0xA:
            pass

    def await_ping(self) -> None:
        """Return once the server has asked for a sign of life; give none."""
        while self._receive_frame()[0] != 0x9:
            pass

    def want_snapshot(self) -> None:
        self.send(b'{"want":"snapshot"}')
