"""What a worker and its coordinator say beside payloads, counted on the wire.

The simulator charges each task, request for text and heartbeat with these figures: here
they are those of real processes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.control import Seed
from tests.integration.fleet import coordinator, make_corpus, wait_for, workers
from tests.sim import fleet as sim

HEAD_END = b"\r\n\r\n"
SETTINGS = {
    "ROUND_KIND": "gradient",
    "ROUND_S": 2,
    "CODEC": "ternary",
    "BROADCAST": "ternary",
    "EVALUATE_EVERY": 10**6,
}
NUM_TASKS = 4


@dataclass(slots=True)
class Proxy:
    """Passes bytes on, and keeps what went each way on each connection."""

    upstream: int
    connections: list[tuple[bytearray, bytearray]] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.upstream))
                up, down = bytearray(), bytearray()
                self.connections.append((up, down))
                for way in ((client, server, up), (server, client, down)):
                    threading.Thread(target=passed_on, args=way, daemon=True).start()

    def sizes(self) -> dict[str, list[tuple[int, int]]]:
        """Return bytes up and down of each request by route, without payloads."""
        found: dict[str, list[tuple[int, int]]] = {}
        for up, down in self.connections:
            for asked, answered in zip(messages(up), messages(down), strict=False):
                line = asked[0].split(b"\r\n")[0].decode()
                route = line.split("?")[0].rstrip("0123456789") if "?" in line else line
                found.setdefault(route, []).append((talk(*asked), talk(*answered)))
        return found


def passed_on(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    with suppress(OSError), source:
        while piece := source.recv(1 << 16):
            kept += piece
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


def messages(stream: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Yield head and body of each whole message."""
    data = bytes(stream)
    while HEAD_END in data:
        head, _, rest = data.partition(HEAD_END)
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        if len(rest) < length:
            return
        yield head + HEAD_END, rest[:length]
        data = rest[length:]


def talk(head: bytes, body: bytes) -> int:
    """Return the bytes of a message that are no payload."""
    if b"application/octet-stream" not in head:
        return len(head) + len(body)
    is_submission = head.startswith(b"POST")
    return len(head) + (4 + int.from_bytes(body[:4], "little")) * is_submission


@contextmanager
def proxied(port: int) -> Iterator[tuple[Proxy, str]]:
    proxy = Proxy(port)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=proxy.serve, args=(listener,), daemon=True).start()
        yield proxy, f"http://127.0.0.1:{listener.getsockname()[1]}"


def mean(sizes: list[tuple[int, int]]) -> tuple[float, float]:
    up, down = zip(*sizes, strict=True)
    return sum(up) / len(up), sum(down) / len(down)


def test_the_simulator_charges_what_is_said(tmp_path: Path) -> None:
    # More than one block: a whole shard is asked for without a Range.
    make_corpus(tmp_path / "corpus", num_files=24, words=9000)
    with (
        coordinator(tmp_path, **SETTINGS) as process,
        proxied(process.port) as (proxy, url),
    ):
        process.tell(Seed())
        with workers(tmp_path, url, "birch"):
            submit = "POST /gradient HTTP/1.1"
            wait_for(
                "submissions",
                lambda: len(proxy.sizes().get(submit, [])) >= NUM_TASKS,
                180.0,
            )
    sizes = proxy.sizes()

    claim = [size for size in sizes["POST /work HTTP/1.1"] if size[1] > 400]
    links = sizes["GET /weights/"]
    parts = [mean(part) for part in (claim, links, sizes[submit])]
    each_task = tuple(map(sum, zip(*parts, strict=True)))
    text = sizes["GET /corpus/train-00000 HTTP/1.1"]
    assert each_task == pytest.approx(
        (sim.TALK_UP_BYTES, sim.TALK_DOWN_BYTES), rel=0.05
    )
    assert mean(text) == pytest.approx(
        (sim.TEXT_UP_BYTES, sim.TEXT_DOWN_BYTES), rel=0.05
    )
    # The longer ones are those with a lease.
    beats = [size for size in sizes["POST /heartbeat HTTP/1.1"] if size[0] > 320]
    assert mean(beats) == pytest.approx(
        (sim.BEAT_UP_BYTES, sim.BEAT_DOWN_BYTES), rel=0.05
    )
