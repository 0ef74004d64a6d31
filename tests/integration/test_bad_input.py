"""Bad input: one clear error with a code and a field, no traceback, nothing changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import requests

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.layout import num_params
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import ErrorCode, FailCode, RoundKind
from coordinator.control import Seed
from tests.integration.fleet import (
    KEY,
    ROOT,
    CoordinatorProcess,
    Hand,
    coordinator,
    make_corpus,
)

JSON = {"X-Api-Key": KEY, "Content-Type": "application/json"}
BYTES = {"X-Api-Key": KEY, "Content-Type": "application/octet-stream"}
CLAIM = {
    "protocol_version": PROTOCOL_VERSION,
    "worker_id": "stranger",
    "claim_id": "c",
}
#: What may change without anything having happened.
PASSING = ("heartbeat_at", "clock_high_water")


@dataclass(frozen=True, slots=True)
class Running:
    process: CoordinatorProcess
    hand: Hand
    #: A training task that the hand holds.
    task: Task

    def post(self, path: str, body: Any, headers: dict[str, str] = JSON) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(
            self.process.url + path, data, headers=headers, timeout=30.0
        )

    def get(self, path: str, **headers: str) -> Any:
        url = self.process.url + path
        return requests.get(url, headers={"X-Api-Key": KEY} | headers, timeout=30.0)

    def dump(self) -> Any:
        """Return every row of every table, and the files of the data folder."""
        tables = self.process.rows("SELECT name FROM sqlite_master WHERE type='table'")
        rows = {
            name: [
                row
                for row in self.process.rows(f"SELECT * FROM {name}")
                if not any(word in map(str, row) for word in PASSING)
            ]
            for (name,) in tables
            if name not in ("workers", "events")
        }
        files = {
            str(path.relative_to(self.process.data)): path.stat().st_size
            for kind in ("published", "state", "payload")
            for path in (self.process.data / kind).iterdir()
        }
        return rows, files


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bad-input")
    manifest = make_corpus(folder / "corpus", num_files=12, words=300)
    (folder / "corpus" / "notes.txt").write_text("plain text")
    with coordinator(folder, EVALUATE_EVERY=1000) as process:
        process.tell(Seed(tokens=1024))
        hand = Hand(process.url, manifest)
        hand.register()
        yield Running(process, hand, hand.claim_training())


def assert_refused(
    response: Any, status: int, code: ErrorCode, field: str | None
) -> None:
    body = response.json()
    assert (response.status_code, body["code"], body.get("field")) == (
        status,
        code,
        field,
    ), body
    assert body["message"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize("key", [None, "", "k" * 39, "x" * 40])
@pytest.mark.parametrize(
    "path",
    [
        "/register",
        "/work",
        "/heartbeat",
        "/gradient",
        "/tasks/t-1/release",
        "/tasks/t-1/fail",
        "/tasks/t-1/evaluation",
        "/logs",
    ],
)
def test_nothing_is_done_without_the_right_key(
    running: Running, path: str, key: str | None
) -> None:
    before = running.dump()
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["X-Api-Key"] = key

    response = running.post(path, {}, headers)

    assert_refused(response, 401, ErrorCode.UNAUTHORIZED, "X-Api-Key")
    assert running.dump() == before


@pytest.mark.parametrize("path", ["/weights/1", "/corpus/train-00000", "/status"])
def test_nothing_is_read_without_the_right_key(running: Running, path: str) -> None:
    response = running.get(path, **{"X-Api-Key": "wrong"})

    assert response.status_code == 401
    assert response.json()["code"] == ErrorCode.UNAUTHORIZED


def test_headers_for_browsers_come_with_what_a_browser_may_get(
    running: Running,
) -> None:
    """A worker's answers have none that it does not read."""
    for_browsers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    refused = running.get("/weights/1", **{"X-Api-Key": "wrong"})
    bad_lease = running.get("/weights/999")
    status = running.get("/status")
    for answer in (refused, bad_lease, status):
        assert answer.headers.items() >= for_browsers.items()
        assert not answer.headers.keys() & {"Date", "Server"}

    beat = running.post("/heartbeat", {"worker_id": "hand", "phase": "idle"})

    assert beat.json()["lease"] == "none"
    assert {*beat.headers} == {"Content-Type", "Content-Length"}


def test_health_is_for_everybody(running: Running) -> None:
    response = requests.get(f"{running.process.url}/health", timeout=30.0)

    assert (response.status_code, response.json()) == (200, {"status": "alive"})


def registration(**changes: Any) -> dict[str, Any]:
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "worker_id": "w",
        "name": "w",
        "package_version": "0",
        "cpu_model": "c",
        "isa": "i",
        "threads": 1,
    }
    return fields | changes


@pytest.mark.parametrize(
    ("changes", "status", "code", "field"),
    [
        ({"preset": "tinny"}, 400, ErrorCode.UNKNOWN_PRESET, "preset"),
        ({"preset": "large"}, 409, ErrorCode.PRESET_MISMATCH, "preset"),
        ({"protocol_version": 9}, 400, ErrorCode.PROTOCOL_MISMATCH, "protocol_version"),
        ({"worker_id": "../x"}, 400, ErrorCode.BAD_REQUEST, "worker_id"),
        ({"threads": 0}, 400, ErrorCode.BAD_REQUEST, "threads"),
        ({"threads": "two"}, 400, ErrorCode.BAD_REQUEST, "threads"),
        ({"surprise": 1}, 400, ErrorCode.BAD_REQUEST, "surprise"),
    ],
)
def test_a_bad_registration_is_refused(
    running: Running,
    changes: dict[str, Any],
    status: int,
    code: ErrorCode,
    field: str,
) -> None:
    before = running.process.rows("SELECT * FROM workers WHERE worker_id <> 'hand'")

    response = running.post("/register", registration(**changes))

    assert_refused(response, status, code, field)
    after = running.process.rows("SELECT * FROM workers WHERE worker_id <> 'hand'")
    assert after == before


def test_an_unknown_preset_is_told_the_nearest_name(running: Running) -> None:
    response = running.post("/register", registration(preset="tinny"))

    assert "did you mean 'tiny'" in response.json()["message"]


def vector(running: Running, value: float = 0.0) -> Any:
    return np.full(num_params(running.hand.shape), value, dtype=np.float32)


def bad_scale(running: Running) -> bytes:
    """Return an int8 payload with NaN for a scale, as no encoder would write it."""
    payload = bytearray(encode(Codec.INT8, vector(running, 1.0)))
    nan = np.float32(np.nan).tobytes()
    one = np.float32(1.0 / 127).tobytes()
    place = bytes(payload).index(one)
    payload[place : place + 4] = nan
    return bytes(payload)


def refused_bodies(running: Running) -> dict[str, tuple[bytes, int, Any, Any]]:
    hand, task = running.hand, running.task
    good = hand.body(task, vector(running))
    stale = msgspec.structs.replace(task, base_version=7)
    gradient = msgspec.structs.replace(task, round_kind=RoundKind.GRADIENT)
    return {
        "a gradient": (
            hand.body(gradient, vector(running)),
            400,
            ErrorCode.BAD_FRAME,
            "frame",
        ),
        "too short": (good[:-1], 400, ErrorCode.WRONG_LENGTH, "frame"),
        "too long": (good + b"x", 400, ErrorCode.WRONG_LENGTH, "frame"),
        "empty": (b"", 400, ErrorCode.WRONG_LENGTH, "body"),
        "no JSON": (b"\x02\0\0\0{]", 400, ErrorCode.BAD_REQUEST, "body"),
        "huge JSON": (b"\xff\xff\xff\xff{}", 400, ErrorCode.BAD_REQUEST, "body"),
        "flipped bit": (
            good[:-40] + bytes([good[-40] ^ 1]) + good[-39:],
            400,
            ErrorCode.BAD_FRAME,
            "frame",
        ),
        "NaN": (
            hand.body_of(task, bad_scale(running)),
            400,
            ErrorCode.NON_FINITE,
            "gradient",
        ),
        "stale": (
            hand.body(stale, vector(running)),
            409,
            ErrorCode.STALE_BASE,
            "base_version",
        ),
        "foreign lease": (
            hand.body(task, vector(running), lease_id="f" * 32),
            409,
            ErrorCode.LEASE_LOST,
            "lease_id",
        ),
        "foreign worker": (
            hand.body(task, vector(running), worker_id="somebody"),
            409,
            ErrorCode.LEASE_LOST,
            "worker_id",
        ),
        "other tokens": (
            hand.body(task, vector(running), tokens=5),
            400,
            ErrorCode.WRONG_LENGTH,
            "tokens",
        ),
        "unknown task": (
            hand.body(task, vector(running), task_id="t-0"),
            404,
            ErrorCode.UNKNOWN_TASK,
            "task_id",
        ),
    }


CASES = [
    "a gradient",
    "too short",
    "too long",
    "empty",
    "no JSON",
    "huge JSON",
    "flipped bit",
    "NaN",
    "stale",
    "foreign lease",
    "foreign worker",
    "other tokens",
    "unknown task",
]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_submission_changes_nothing(running: Running, case: str) -> None:
    body, status, code, field = refused_bodies(running)[case]
    before = running.dump()

    response = running.post("/gradient", body, BYTES)

    assert_refused(response, status, code, field)
    assert running.dump() == before


@pytest.mark.parametrize(
    ("path", "status", "code", "field"),
    [
        ("/corpus/none", 404, ErrorCode.UNKNOWN_SHARD, "shard_id"),
        ("/corpus/..%2Fdata%2Ffleet.db", 404, ErrorCode.UNKNOWN_SHARD, "shard_id"),
        ("/weights/99", 404, ErrorCode.UNKNOWN_VERSION, "version"),
        ("/weights/99?from=98", 404, ErrorCode.UNKNOWN_VERSION, "version"),
        ("/weights/1?from=-1", 400, ErrorCode.BAD_REQUEST, "from"),
        ("/weights/1?from=", 400, ErrorCode.BAD_REQUEST, "from"),
        ("/weights/1?from=1&from=2", 400, ErrorCode.BAD_REQUEST, "from"),
        ("/weights/abc", 404, ErrorCode.NOT_FOUND, None),
        ("/nowhere", 404, ErrorCode.NOT_FOUND, None),
    ],
)
def test_what_is_not_there_is_said_so(
    running: Running, path: str, status: int, code: ErrorCode, field: str | None
) -> None:
    assert_refused(running.get(path), status, code, field)


def test_a_range_beyond_the_end_is_refused(running: Running) -> None:
    response = running.get("/weights/1", Range="bytes=999999999-")

    assert_refused(response, 416, ErrorCode.BAD_RANGE, "Range")
    assert response.headers["Content-Range"].startswith("bytes */")


def test_text_is_served_as_text_and_tokens_as_bytes(running: Running) -> None:
    text = running.get("/corpus/notes")
    shard = running.get("/corpus/train-00000", Range="bytes=0-3")

    assert text.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert shard.headers["Content-Type"] == "application/octet-stream"
    assert (shard.status_code, len(shard.content)) == (206, 4)


def test_a_foreign_lease_can_neither_release_nor_fail_a_task(running: Running) -> None:
    path = f"/tasks/{running.task.task_id}"
    mine = {"worker_id": "hand", "lease_id": "0" * 32}
    before = running.dump()

    release = running.post(f"{path}/release", mine | {"reason": "x"})
    fail = running.post(
        f"{path}/fail", mine | {"code": FailCode.WORKER_ERROR, "message": "x"}
    )

    for response in (release, fail):
        assert_refused(response, 409, ErrorCode.LEASE_LOST, "lease_id")
    assert running.dump() == before


def test_another_type_of_body_is_refused(running: Running) -> None:
    response = running.post("/work", b"{}", JSON | {"Content-Type": "text/plain"})

    assert_refused(response, 415, ErrorCode.UNSUPPORTED_MEDIA, "Content-Type")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol_version": 9}, ErrorCode.PROTOCOL_MISMATCH),
        # Up to 4 a claim did not say it.
        ({"protocol_version": None}, ErrorCode.BAD_REQUEST),
    ],
)
def test_a_worker_of_another_protocol_gets_no_lease(
    running: Running, changes: dict[str, Any], code: ErrorCode
) -> None:
    said = CLAIM | {"worker_id": "hand"} | changes
    claim = {name: value for name, value in said.items() if value is not None}

    response = running.post("/work", claim)

    assert_refused(response, 400, code, "protocol_version")
    leased = "SELECT task_id FROM tasks WHERE lease_claim_id = 'c'"
    assert running.process.rows(leased) == []


def test_another_method_is_refused(running: Running) -> None:
    response = running.get("/register")

    assert_refused(response, 405, ErrorCode.METHOD_NOT_ALLOWED, None)


def test_an_unknown_worker_must_register_first(running: Running) -> None:
    response = running.post("/work", CLAIM)

    assert_refused(response, 404, ErrorCode.UNKNOWN_WORKER, "worker_id")


def test_without_a_corpus_workers_are_told_to_come_again(tmp_path: Path) -> None:
    with coordinator(tmp_path) as process:
        register = requests.post(
            f"{process.url}/register", json=registration(), headers=JSON, timeout=30.0
        )
        work = requests.post(
            f"{process.url}/work",
            json=CLAIM,
            headers=JSON,
            timeout=30.0,
        )
        missing = process.status()["missing"]

    for response in (register, work):
        assert_refused(response, 503, ErrorCode.NO_RUN, None)
        assert int(response.headers["Retry-After"]) > 0
    assert "bitnet-coordinator tokenize-corpus" in missing


def test_the_corpus_of_a_running_coordinator_is_not_replaced_from_elsewhere(
    tmp_path: Path,
) -> None:
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path):
        done = run(
            "coordinator",
            "tokenize-corpus",
            BITNET_COORD_DATA=str(tmp_path / "another"),
            BITNET_COORD_CORPUS=str(tmp_path / "corpus"),
        )

    assert done.returncode == 2
    assert "in use by a coordinator" in done.stderr


def test_a_damaged_shard_stops_the_start(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    shard = tmp_path / "corpus/tokenized/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")

    done = run(
        "coordinator",
        "serve",
        BITNET_COORD_DATA=str(tmp_path / "data"),
        BITNET_COORD_CORPUS=str(tmp_path / "corpus"),
        BITNET_COORD_PORT="0",
    )

    assert done.returncode == 2
    assert f"{shard} is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def run(module: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BITNET_")}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "arguments", "env", "named"),
    [
        ("worker", ["run"], {"BITNET_COORDINATOR_URL": "ftp:/x"}, "ftp:/x"),
        ("worker", ["run"], {}, "BITNET_COORDINATOR_URL"),
        ("coordinator", ["serve", "--preset", "tinny"], {}, "tinny"),
        ("coordinator", ["serve", "--port", "70000"], {}, "70000"),
        ("coordinator", ["serve", "--host", "0.0.0.0"], {}, "0.0.0.0"),
        ("coordinator", ["tokenize-corpus", "--corpus", "no-folder"], {}, "no-folder"),
        ("coordinator", ["seed-real-tasks", "many"], {}, "many"),
        ("coordinator", ["seed-real-tasks"], {}, "tokenize-corpus"),
        ("coordinator", ["demo", "--minutes", "-1"], {}, "-1"),
        ("coordinator", ["demo", "--corpus", "no-folder"], {}, "no-folder"),
    ],
)
def test_a_bad_command_is_one_line_and_status_2(
    tmp_path: Path, module: str, arguments: list[str], env: dict[str, str], named: str
) -> None:
    folders = {
        "BITNET_COORD_DATA": str(tmp_path / "data"),
        "BITNET_COORD_CORPUS": str(tmp_path / "corpus"),
    }
    if arguments[0] == "demo":
        arguments = [*arguments, "--state", str(tmp_path / "state")]

    done = run(module, *arguments, **folders | env)

    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert named in lines[0]
