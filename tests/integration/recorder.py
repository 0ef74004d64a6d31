"""A proxy between workers and the coordinator: it writes down what really passed.

What it saw is counted without a word of the coordinator's own. It can also send
every submission twice, as a network may.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitnet_ext.wire.messages import Task
from coordinator.domain.manifest import Manifest
from worker.order import sequence_starts

_PASSED_ON = ("X-Api-Key", "Content-Type", "Range", "If-Range")
_PASSED_BACK = ("Content-Type", "Content-Range", "ETag", "Retry-After")


@dataclass(slots=True)
class Recorder:
    """What passed, in order of arrival."""

    #: task_id -> terms of the claim.
    tasks: dict[str, Any] = field(default_factory=dict)
    #: (JSON block, frame, status, answer) of each first try of a submission.
    submissions: list[tuple[Any, bytes, int, bytes]] = field(default_factory=list)
    #: (status, answer) of each second try.
    repeats: list[tuple[int, bytes]] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def times_trained(self, manifest: Manifest) -> dict[str, NDArray[np.int64]]:
        """Return how often each token of each training shard was accepted."""
        counts = {
            shard.shard_id: np.zeros(shard.num_tokens, np.int64)
            for shard in manifest.train_shards()
        }
        for block, _frame, status, _answer in self.submissions:
            if status == 200:
                task = msgspec.convert(self.tasks[block["task_id"]], Task)
                num_sequences = -(-block["tokens"] // task.seq_len)
                for start in sequence_starts(task)[:num_sequences]:
                    counts[task.shard_id][start : start + task.seq_len] += 1
        return counts


class _Proxy(ThreadingHTTPServer):
    """Passes everything on to `upstream`, a port of this machine."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.seen = Recorder()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a worker."""

    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.forward("GET")

    def do_POST(self) -> None:
        self.forward("POST")

    def forward(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, answer = self.ask(method, body)
        self.write_down(body, status, answer)
        self.send_response(status)
        for name in _PASSED_BACK:
            if headers.get(name) is not None:
                self.send_header(name, headers[name])
        if status != 204:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def ask(self, method: str, body: bytes) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.server.upstream, timeout=60.0
        )
        with contextlib.closing(connection):
            headers = {
                name: self.headers[name] for name in _PASSED_ON if self.headers[name]
            }
            connection.request(method, self.path, body or None, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def write_down(self, body: bytes, status: int, answer: bytes) -> None:
        seen = self.server.seen
        if self.path == "/work" and status == 200:
            terms = json.loads(answer)
            with seen.guard:
                seen.tasks[terms["task_id"]] = terms
        if self.path == "/gradient":
            length = int.from_bytes(body[:4], "little")
            block = json.loads(body[4 : 4 + length])
            again_status, _, again = self.ask("POST", body)
            with seen.guard:
                seen.submissions.append((block, body[4 + length :], status, answer))
                seen.repeats.append((again_status, again))


@contextmanager
def recording(port: int) -> Iterator[tuple[str, Recorder]]:
    """Yield the address of a proxy to `port`, and what it writes down."""
    with _Proxy(port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}", proxy.seen
        finally:
            proxy.shutdown()
            thread.join()
