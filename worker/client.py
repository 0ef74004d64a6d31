"""The worker's half of the worker API: one method, one request, one try.

Only paths on the coordinator's own address are asked for, redirects and proxies
from the environment are refused: the key goes to the coordinator and nowhere
else. What may be repeated raises RetryLaterError; `worker.retry` repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
import requests
from urllib3.util import SKIP_HEADER

from bitnet_ext.wire.messages import (
    ClaimRequest,
    ErrorBody,
    EvaluationAnswer,
    EvaluationRequest,
    FailRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    LogsRequest,
    Message,
    RegisterAnswer,
    RegisterRequest,
    ReleaseRequest,
    SubmissionAnswer,
    SubmissionMeta,
    Task,
    TaskAnswer,
)
from bitnet_ext.wire.verdicts import ErrorCode
from worker.errors import (
    BadDownloadError,
    LeaseLostError,
    ProtocolError,
    RefusedError,
    RetryLaterError,
)

M = TypeVar("M", bound=Message)

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
CONNECT_S: Final = 5.0
READ_S: Final = 30.0
#: The wait after an empty queue where the coordinator names none.
IDLE_S: Final = 2.0
#: No answer can make a worker wait longer than this.
MAX_RETRY_AFTER_S: Final = 60.0
_CHUNK_BYTES: Final = 1 << 16
_NO_ANSWER: Final = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


def _ignore(_num_bytes: int) -> None:
    """Count nothing."""


@dataclass(frozen=True, slots=True)
class NoWork:
    """The answer to a claim when the queue is empty."""

    retry_after_s: float


@dataclass(slots=True, kw_only=True)
class Download:
    """A stretch of a file on its way; kept over several tries, which go on where it is.

    `into` has the length of the stretch, and holds `received` bytes of it.
    """

    path: str
    #: First byte of the stretch, and size of the whole file, in bytes.
    start: int
    total: int
    #: SHA-256 of the whole file in hexadecimal; None where nobody knows it yet.
    sha256: str | None
    into: memoryview
    #: Called with the size of each piece; may raise to give up.
    on_bytes: Callable[[int], None] = _ignore
    received: int = 0

    @property
    def missing(self) -> str | None:
        """The rest, as `Range` and `Content-Range` have it; None for the whole file."""
        first, last = self.start + self.received, self.start + len(self.into) - 1
        return None if last - first + 1 == self.total else f"{first}-{last}"

    def take(self, piece: bytes) -> None:
        """Put the next piece in its place; raises BadDownloadError when too long."""
        end = self.received + len(piece)
        if end > len(self.into):
            raise BadDownloadError(
                f"{self.path}: more than the {len(self.into)} bytes asked for"
            )
        self.into[self.received : end] = piece
        self.received = end
        self.on_bytes(len(piece))


@dataclass(slots=True)
class _Upload:
    """A body that counts itself while it is sent."""

    body: memoryview
    on_bytes: Callable[[int], None]
    sent: int = field(default=0)

    def __len__(self) -> int:
        return len(self.body)

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, or the rest."""
        end = len(self.body) if size < 0 else self.sent + size
        piece = bytes(self.body[self.sent : end])
        self.sent += len(piece)
        self.on_bytes(len(piece))
        return piece


class Client:
    """Typed calls to one coordinator, for use by one thread.

    Every method raises RetryLaterError where the same request may be sent
    again, RefusedError with the coordinator's code, LeaseLostError, or
    ProtocolError for an answer that makes no sense.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        connect_s: float = CONNECT_S,
        read_s: float = READ_S,
    ) -> None:
        self._base_url = base_url
        self._timeout_s = (connect_s, read_s)
        self._session = requests.Session()
        # No proxies, no .netrc: where the key goes is decided by the address alone.
        self._session.trust_env = False
        # Nothing that the coordinator does not read: it is sent with each request.
        self._session.headers.clear()
        self._session.headers.update(
            {
                "X-Api-Key": api_key,
                "Accept-Encoding": "identity",
                "User-Agent": SKIP_HEADER,
            }
        )

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def register(self, request: RegisterRequest) -> RegisterAnswer:
        """`POST /register`."""
        return self._post("/register", request, RegisterAnswer)

    def claim(self, request: ClaimRequest) -> Task | NoWork:
        """`POST /work`: a task, or how long to wait when there is none."""
        response = self._send("POST", "/work", body=msgspec.json.encode(request))
        if response.status_code == requests.codes.no_content:
            return NoWork(_retry_after_s(response) or IDLE_S)
        return _decode(response, Task)

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatAnswer:
        """`POST /heartbeat`."""
        return self._post("/heartbeat", request, HeartbeatAnswer)

    def submit(
        self, body: bytes, on_bytes: Callable[[int], None] = _ignore
    ) -> SubmissionAnswer:
        """`POST /gradient` with a body of `submission_body`."""
        response = self._send(
            "POST",
            "/gradient",
            body=_Upload(memoryview(body), on_bytes),
            content_type=BYTES,
        )
        return _decode(response, SubmissionAnswer)

    def evaluate(self, task_id: str, request: EvaluationRequest) -> EvaluationAnswer:
        """`POST /tasks/{task_id}/evaluation`."""
        return self._post(f"/tasks/{task_id}/evaluation", request, EvaluationAnswer)

    def release(self, task_id: str, request: ReleaseRequest) -> TaskAnswer:
        """`POST /tasks/{task_id}/release`."""
        return self._post(f"/tasks/{task_id}/release", request, TaskAnswer)

    def fail(self, task_id: str, request: FailRequest) -> TaskAnswer:
        """`POST /tasks/{task_id}/fail`."""
        return self._post(f"/tasks/{task_id}/fail", request, TaskAnswer)

    def logs(self, request: LogsRequest) -> None:
        """`POST /logs`; the answer says nothing."""
        self._send("POST", "/logs", body=msgspec.json.encode(request))

    def continue_download(self, download: Download) -> None:
        """Fetch what is missing of `download`, by Range unless that is all of it.

        Raises RetryLaterError when the connection breaks: call again to go on
        from there; BadDownloadError when the answer is not exactly the rest.
        """
        missing = download.missing
        headers = {} if missing is None else {"Range": f"bytes={missing}"}
        response = self._send("GET", download.path, headers=headers, stream=True)
        before = download.received
        try:
            with response:
                _check_download(response, download)
                for piece in response.iter_content(_CHUNK_BYTES):
                    download.take(piece)
        except _NO_ANSWER as error:
            raise _cut(download, before) from error
        if download.received < len(download.into):
            raise _cut(download, before)

    def _post(self, path: str, request: Message, answer: type[M]) -> M:
        response = self._send("POST", path, body=msgspec.json.encode(request))
        return _decode(response, answer)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | _Upload | None = None,
        content_type: str = JSON,
        headers: dict[str, str] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """Return an answer of the 2xx family; every other one is raised."""
        sent_headers = dict(headers or {})
        if body is not None:
            sent_headers["Content-Type"] = content_type
        try:
            response = self._session.request(
                method,
                self._base_url + path,
                data=body,
                headers=sent_headers,
                timeout=self._timeout_s,
                allow_redirects=False,
                stream=stream,
            )
            if not response.ok or response.is_redirect:
                raise _refusal(response, method, path)
        except _NO_ANSWER as error:
            raise RetryLaterError(
                f"{method} {self._base_url}{path}: no answer ({_reason(error)})"
            ) from error
        # A ValueError is what urllib3 makes of an address in a redirect.
        except (requests.RequestException, ValueError) as error:
            raise ProtocolError(
                f"{method} {path}: not HTTP as we know it ({type(error).__name__})"
            ) from error
        return response


def submission_body(meta: SubmissionMeta, frame: bytes) -> bytes:
    """Return the body of `POST /gradient`.

    The length of the JSON block as an unsigned 32-bit little-endian integer,
    the JSON block, the frame.
    """
    block = msgspec.json.encode(meta)
    return b"".join((len(block).to_bytes(4, "little"), block, frame))


def _reason(error: BaseException) -> str:
    """Return what the system said of a failed request, else the type of its error.

    The text of the outer errors holds addresses of objects.
    """
    inner = error
    while isinstance(inner.__context__, Exception):
        inner = inner.__context__
    said = inner.strerror if isinstance(inner, OSError) else None
    return said or type(error).__name__


def _cut(download: Download, before: int) -> RetryLaterError:
    return RetryLaterError(
        f"GET {download.path}: cut after {download.received} of "
        f"{len(download.into)} bytes",
        progressed=download.received > before,
    )


def _check_download(response: requests.Response, download: Download) -> None:
    """Insist on exactly the bytes asked for, of exactly the file meant."""
    headers, missing = response.headers, download.missing
    status, part = "200", None
    if missing is not None:
        status, part = "206", f"bytes {missing}/{download.total}"
    named = headers.get("ETag")
    etag = named if download.sha256 is None else f'"sha256-{download.sha256}"'
    left = len(download.into) - download.received
    for name, value, got in (
        ("status", status, str(response.status_code)),
        ("Content-Type", BYTES, headers.get("Content-Type")),
        ("Content-Range", part, headers.get("Content-Range")),
        ("Content-Length", str(left), headers.get("Content-Length")),
        ("Content-Encoding", "identity", headers.get("Content-Encoding", "identity")),
        # An answer without an ETag is judged by its bytes alone.
        ("ETag", etag, named or etag),
    ):
        if got != value:
            raise BadDownloadError(
                f"{download.path}: {name} must be {value}, got {str(got)[:200]}"
            )


def _retry_after_s(response: requests.Response) -> float:
    """Return the seconds of `Retry-After`, 0 where it is missing or no number."""
    try:
        seconds = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0


def _refusal(response: requests.Response, method: str, path: str) -> Exception:
    """Return the error that an answer outside the 2xx family stands for."""
    status = response.status_code
    if 300 <= status < 400:
        return ProtocolError(f"{method} {path}: redirect ({status}) refused")
    try:
        body = msgspec.json.decode(response.content, type=ErrorBody)
    except msgspec.DecodeError:
        body = None
    said = f"{body.code}: {body.message}" if body else f"status {status}"
    if status >= 500 or status == requests.codes.too_many_requests:
        return RetryLaterError(
            f"{method} {path}: {said}", retry_after_s=_retry_after_s(response)
        )
    if body is None:
        return ProtocolError(f"{method} {path}: {said}, not an answer of a coordinator")
    if body.code is ErrorCode.LEASE_LOST:
        return LeaseLostError(body.message)
    return RefusedError(body.code, body.message, field=body.field)


def _decode(response: requests.Response, answer: type[M]) -> M:
    try:
        return msgspec.json.decode(response.content, type=answer)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            f"{response.request.path_url} answered no {answer.__name__}: {error}"
        ) from error
