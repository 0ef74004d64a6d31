"""How a coordinator begins and ends: a port that is taken, being told to stop."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitnet_ext.layout import num_params
from bitnet_ext.wire import PROTOCOL_VERSION
from coordinator.control import Seed
from tests.integration.fleet import (
    KEY,
    ROOT,
    CoordinatorProcess,
    Hand,
    coordinator,
    make_corpus,
    wait_for,
)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path, EVALUATE_EVERY=1000) as found:
        yield found


def hand_of(process: CoordinatorProcess, tmp_path: Path) -> Hand:
    manifest = make_corpus(tmp_path / "the-same", num_files=12, words=300)
    hand = Hand(process.url, manifest)
    hand.register()
    return hand


def test_an_upload_in_flight_is_finished_and_answered(
    process: CoordinatorProcess, tmp_path: Path
) -> None:
    process.tell(Seed(tokens=1024))
    hand = hand_of(process, tmp_path)
    task = hand.claim_training()
    body = hand.body(task, np.zeros(num_params(hand.shape), np.float32))
    head = (
        f"POST /gradient HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\n"
        "Content-Type: application/octet-stream\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", process.port), 30.0) as line:
        line.sendall(head)
        assert line.recv(65536).startswith(b"HTTP/1.1 100")  # it is under way
        line.sendall(body[:100_000])

        process.process.send_signal(signal.SIGTERM)
        wait_for("the port to be closed", lambda: is_refused(process.port))
        line.sendall(body[100_000:])

        answer = b"".join(iter(lambda: line.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert json.loads(answer.split(b"\r\n\r\n")[1])["state"] == "accepted"
    assert process.process.wait(30.0) == 0


def is_refused(port: int) -> bool:
    """Return whether the coordinator takes no connection any more.

    One that it closes on its way in is only reset.
    """
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_a_worker_that_waits_for_work_is_told_that_there_is_none(
    process: CoordinatorProcess, tmp_path: Path
) -> None:
    hand = hand_of(process, tmp_path)
    task = hand.claim()
    assert task is not None  # the score of version 1; nothing else is to be done
    hand.evaluate(task)
    said = {"protocol_version": PROTOCOL_VERSION, "worker_id": hand.name}
    claim = json.dumps(said | {"claim_id": "c-last"}).encode()
    head = (
        f"POST /work HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\n"
        "Content-Type: application/json\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(claim)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", process.port), 30.0) as line:
        line.sendall(head)
        assert line.recv(65536).startswith(b"HTTP/1.1 100")  # it is under way
        line.sendall(claim)

        assert process.stop() == 0

        assert line.recv(65536).startswith(b"HTTP/1.1 204")


def test_a_start_on_a_taken_port_makes_nothing_and_keeps_no_password_back(
    tmp_path: Path,
) -> None:
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = serve(tmp_path, taken.getsockname()[1])
        error = refused.communicate(timeout=60.0)[1]
    assert refused.returncode == 2
    assert error.startswith("bitnet-coordinator: cannot listen on host '127.0.0.1'")
    assert not (tmp_path / "data").exists()

    first = serve(tmp_path, 0)
    assert first.stdout is not None
    lines = [first.stdout.readline() for _ in range(2)]
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60.0)
    assert lines[1].startswith("Admin password, shown this once: ")


def test_a_coordinator_whose_disk_takes_nothing_more_stops_as_any_other(
    process: CoordinatorProcess, tmp_path: Path
) -> None:
    hand = hand_of(process, tmp_path)
    task = hand.claim()
    # From now on no file takes more than its first byte.
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1, 1))

    assert process.stop() == 0

    process.start_again()
    assert task is not None
    hand.evaluate(task)  # what was committed is there


def serve(folder: Path, port: int) -> subprocess.Popen[str]:
    settings = {
        "BITNET_COORD_DATA": str(folder / "data"),
        "BITNET_COORD_CORPUS": str(folder / "corpus"),
        "BITNET_COORD_PORT": str(port),
        "BITNET_COORD_PRESET": "tiny",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "coordinator", "serve"],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
