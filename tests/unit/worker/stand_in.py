"""A small HTTP server that says what a test tells it, in the coordinator's place."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from bitnet_ext.wire.messages import ErrorBody, Message
from bitnet_ext.wire.verdicts import ErrorCode

KEY = "a-key-of-the-fleet"
BYTES = "application/octet-stream"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return msgspec.json.decode(self.body)


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    #: Close the connection after so many bytes of the body; -1: before any answer.
    cut_after: int | None = None


HANG_UP = Reply(cut_after=-1)
Step = Reply | Callable[[Request], Reply]


def says(message: Message | dict, status: int = 200, **headers: str) -> Reply:
    return Reply(status, msgspec.json.encode(message), headers)


def refuses(status: int, code: ErrorCode, retry_after: str | None = None) -> Reply:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    body = ErrorBody(code=code, message="because")
    return Reply(status, msgspec.json.encode(body), headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: a client that goes away is part of many tests."""


class StandIn:
    """Answers each route by its steps in turn; the last step is repeated."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._steps: dict[str, list[Step]] = {}
        self._guard = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_GET(self) -> None:
                stand_in._handle(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.005}
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def on(self, route: str, *steps: Step) -> None:
        """Answer a route such as `POST /work` from now on."""
        with self._guard:
            self._steps[route] = list(steps)

    def serve(self, path: str, content: bytes) -> None:
        """Serve a file by Range."""
        self.on(f"GET {path}", lambda request: part_of(content, request))

    def asked(self, route: str) -> list[Request]:
        """Return the requests of a route so far."""
        method, path = route.split()
        return [r for r in self.requests if (r.method, r.path) == (method, path)]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("Content-Length", "0"))
        request = Request(
            handler.command,
            handler.path,
            dict(handler.headers.items()),
            handler.rfile.read(size),
        )
        _send(handler, self._reply(request))

    def _reply(self, request: Request) -> Reply:
        with self._guard:
            self.requests.append(request)
            steps = self._steps.get(f"{request.method} {request.path}")
            if steps is None:
                return refuses(404, ErrorCode.NOT_FOUND)
            step = steps[0] if len(steps) == 1 else steps.pop(0)
        return step(request) if callable(step) else step


def part_of(content: bytes, request: Request, **changes: str) -> Reply:
    """Return the answer of a good server to a Range or for all, with other headers."""
    headers = {
        "Content-Type": BYTES,
        "ETag": f'"sha256-{hashlib.sha256(content).hexdigest()}"',
    }
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    if "Range" not in request.headers:
        return Reply(200, content, headers | named)
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"])
    first, last = int(found[1]), int(found[2])
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Reply(206, content[first : last + 1], headers | named)


def _send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    body = reply.body
    if reply.cut_after is not None:
        handler.close_connection = True
        body = body[: max(0, reply.cut_after)]
    if reply.cut_after == -1:
        return
    handler.send_response(reply.status)
    headers = dict(reply.headers)
    if reply.status != 204:
        headers.setdefault("Content-Length", str(len(reply.body)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()
