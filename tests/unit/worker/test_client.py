"""The client against a real server: what it sends, insists on and raises."""

from __future__ import annotations

import hashlib
from functools import partial

import msgspec
import pytest

from bitnet_ext.wire.messages import (
    ClaimRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    SubmissionAnswer,
    SubmissionMeta,
)
from bitnet_ext.wire.verdicts import (
    ErrorCode,
    LeaseState,
    SubmissionState,
    WorkerPhase,
)
from tests.unit.worker.stand_in import HANG_UP, KEY, Reply, part_of, refuses, says
from worker.client import Client, Download, NoWork, submission_body
from worker.errors import (
    BadDownloadError,
    LeaseLostError,
    ProtocolError,
    RefusedError,
    RetryLaterError,
)

CONTENT = bytes(range(256)) * 800
CLAIM = ClaimRequest(protocol_version=1, worker_id="w1", claim_id="c1")
BEAT = HeartbeatRequest(worker_id="w1", phase=WorkerPhase.IDLE)
BEAT_ANSWER = HeartbeatAnswer(lease=LeaseState.NONE, lease_s=30.0, heartbeat_s=5.0)


def a_download(start: int = 0, length: int = len(CONTENT), **changes) -> Download:
    fields = {
        "path": "/weights/7",
        "start": start,
        "total": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "into": memoryview(bytearray(length)),
    }
    return Download(**(fields | changes))


def test_every_request_carries_the_key_and_the_body_as_json(
    coordinator, client
) -> None:
    coordinator.on("POST /heartbeat", says(BEAT_ANSWER))

    assert client.heartbeat(BEAT) == BEAT_ANSWER

    (request,) = coordinator.requests
    assert request.headers["X-Api-Key"] == KEY
    assert request.headers["Content-Type"] == "application/json"
    assert request.json()["worker_id"] == "w1"


def test_an_empty_queue_is_a_wait(coordinator, client) -> None:
    coordinator.on(
        "POST /work",
        Reply(204, headers={"Retry-After": "7"}),
        Reply(204),
        Reply(204, headers={"Retry-After": "1e99"}),
        Reply(204, headers={"Retry-After": "nan"}),
    )

    waits = [client.claim(CLAIM) for _ in range(4)]

    assert waits == [NoWork(7.0), NoWork(2.0), NoWork(60.0), NoWork(2.0)]


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (refuses(503, ErrorCode.NO_RUN, "9"), RetryLaterError, "no_run: because"),
        (refuses(429, ErrorCode.RATE_LIMITED), RetryLaterError, "rate_limited"),
        (Reply(502, b"<html>bad gateway"), RetryLaterError, "status 502"),
        (HANG_UP, RetryLaterError, "no answer"),
        (refuses(401, ErrorCode.UNAUTHORIZED), RefusedError, "unauthorized"),
        (refuses(404, ErrorCode.UNKNOWN_WORKER), RefusedError, "unknown_worker"),
        (refuses(409, ErrorCode.LEASE_LOST), LeaseLostError, "lease_lost"),
        (Reply(404, b"<html>not here"), ProtocolError, "status 404"),
        (Reply(200, b"<html>welcome"), ProtocolError, "no HeartbeatAnswer"),
        (says({"lease": "none"}), ProtocolError, "lease_s"),
    ],
)
def test_an_answer_becomes_one_error(coordinator, client, reply, error, said) -> None:
    coordinator.on("POST /heartbeat", reply)

    with pytest.raises(error, match=said) as caught:
        client.heartbeat(BEAT)

    assert type(caught.value) is error


def test_a_refusal_keeps_its_code_and_retry_after(coordinator, client) -> None:
    coordinator.on(
        "POST /heartbeat",
        refuses(503, ErrorCode.BUSY, "9"),
        refuses(409, ErrorCode.STALE_BASE),
    )

    with pytest.raises(RetryLaterError) as later:
        client.heartbeat(BEAT)
    with pytest.raises(RefusedError) as refused:
        client.heartbeat(BEAT)

    assert later.value.retry_after_s == 9.0
    assert refused.value.code is ErrorCode.STALE_BASE


def test_nobody_listening_is_worth_another_try_and_says_where_and_why() -> None:
    client = Client("http://127.0.0.1:1", KEY)

    with pytest.raises(RetryLaterError) as caught:
        client.heartbeat(BEAT)

    client.close()
    assert str(caught.value) == (
        "POST http://127.0.0.1:1/heartbeat: no answer (Connection refused)"
    )


def test_https_asked_of_plain_http_says_that_it_is_about_tls(coordinator) -> None:
    address = coordinator.url.replace("http:", "https:")
    client = Client(address, KEY)

    with pytest.raises(RetryLaterError) as caught:
        client.heartbeat(BEAT)

    client.close()
    assert f"POST {address}/heartbeat: no answer ([SSL" in str(caught.value)


def test_a_redirect_is_refused_and_the_key_stays(coordinator, client) -> None:
    target = coordinator.url.replace("127.0.0.1", "localhost") + "/elsewhere"
    coordinator.on("POST /heartbeat", Reply(307, headers={"Location": target}))
    coordinator.on("GET /weights/7", Reply(302, headers={"Location": target}))

    with pytest.raises(ProtocolError, match="redirect"):
        client.heartbeat(BEAT)
    with pytest.raises(ProtocolError, match="redirect"):
        client.continue_download(a_download())

    assert "/elsewhere" not in [request.path for request in coordinator.requests]


def test_a_redirect_to_no_address_at_all_is_refused_too(coordinator, client) -> None:
    headers = {"Location": "http://[::bad/"}
    coordinator.on("POST /heartbeat", Reply(302, headers=headers))

    with pytest.raises(ProtocolError, match="not HTTP as we know it"):
        client.heartbeat(BEAT)


def test_proxies_and_netrc_of_the_environment_are_ignored(
    coordinator, client, monkeypatch, tmp_path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    coordinator.on("POST /heartbeat", says(BEAT_ANSWER))

    client.heartbeat(BEAT)

    assert "Authorization" not in coordinator.requests[0].headers


@pytest.mark.parametrize(
    ("start", "length", "asked"),
    [(0, len(CONTENT), None), (0, 1000, "bytes=0-999"), (400, 1000, "bytes=400-1399")],
)
def test_a_stretch_is_asked_for_by_range_and_a_whole_file_without(
    coordinator, client, start, length, asked
) -> None:
    coordinator.serve("/weights/7", CONTENT)
    pieces = []
    download = a_download(start, length, on_bytes=pieces.append)

    client.continue_download(download)

    assert bytes(download.into) == CONTENT[start : start + length]
    assert sum(pieces) == length
    (request,) = coordinator.requests
    assert request.headers.get("Range") == asked


def test_a_cut_download_goes_on_where_it_was(coordinator, client) -> None:
    def cut(request):
        return Reply(**(vars(part_of(CONTENT, request)) | {"cut_after": 70_000}))

    coordinator.on("GET /weights/7", cut, lambda request: part_of(CONTENT, request))
    download = a_download()

    with pytest.raises(RetryLaterError, match="cut after") as caught:
        client.continue_download(download)
    received = download.received
    client.continue_download(download)

    assert caught.value.progressed
    assert 0 < received <= 70_000
    assert bytes(download.into) == CONTENT
    last = coordinator.requests[-1].headers["Range"]
    assert last == f"bytes={received}-{len(CONTENT) - 1}"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ETag", '"sha256-other"'),
        ("Content-Range", f"bytes 0-{len(CONTENT) - 1}/999999999"),
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", "12"),
        ("Content-Encoding", "gzip"),
    ],
)
def test_a_download_with_a_wrong_header_is_refused_by_name(
    coordinator, client, header, value
) -> None:
    changes = {header.replace("-", "_"): value}
    coordinator.on(
        "GET /weights/7", lambda request: part_of(CONTENT, request, **changes)
    )
    download = a_download()

    with pytest.raises(BadDownloadError, match=f"/weights/7: {header} must be"):
        client.continue_download(download)

    assert download.received == 0


def test_a_whole_file_in_place_of_a_part_is_refused(coordinator, client) -> None:
    coordinator.on("GET /weights/7", Reply(200, CONTENT))

    with pytest.raises(BadDownloadError, match="status must be 206, got 200"):
        client.continue_download(a_download(400, 1000))


def test_a_part_in_place_of_a_whole_file_is_refused(coordinator, client) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    coordinator.on("GET /weights/7", Reply(206, CONTENT, headers))

    with pytest.raises(BadDownloadError, match="status must be 200, got 206"):
        client.continue_download(a_download())


def test_a_listener_can_give_up_a_download(coordinator, client) -> None:
    coordinator.serve("/weights/7", CONTENT)

    def give_up(_num_bytes: int) -> None:
        raise LeaseLostError("gone")

    with pytest.raises(LeaseLostError):
        client.continue_download(a_download(on_bytes=give_up))


def test_a_submission_is_metadata_and_frame_and_counts_itself(
    coordinator, client
) -> None:
    meta = SubmissionMeta(
        submission_id="s1",
        task_id="t1",
        lease_id="0" * 32,
        worker_id="w1",
        base_version=1,
        num_steps=2,
        tokens=64,
        loss_first=4.0,
        loss_last=3.0,
        loss_mean=3.5,
        compute_s=1.0,
        download_s=0.0,
        download_bytes=0,
        cpu_s=1.0,
    )
    answer = SubmissionAnswer(state=SubmissionState.ACCEPTED, round_id=1)
    coordinator.on("POST /gradient", says(answer))
    pieces = []

    assert client.submit(submission_body(meta, CONTENT), pieces.append) == answer

    (request,) = coordinator.requests
    size = int.from_bytes(request.body[:4], "little")
    assert msgspec.json.decode(request.body[4 : 4 + size], type=SubmissionMeta) == meta
    assert request.body[4 + size :] == CONTENT
    assert request.headers["Content-Type"] == "application/octet-stream"
    assert sum(pieces) == len(request.body)


def test_the_same_body_can_be_sent_twice(coordinator, client) -> None:
    answer = SubmissionAnswer(state=SubmissionState.ACCEPTED, round_id=1)
    coordinator.on("POST /gradient", HANG_UP, says(answer))
    send = partial(client.submit, b"\x02\x00\x00\x00{}" + CONTENT)

    with pytest.raises(RetryLaterError):
        send()

    assert send() == answer
    first, second = coordinator.requests
    assert first.body == second.body
