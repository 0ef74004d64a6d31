"""What every route of the worker API has in common: key, JSON, errors as JSON."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import msgspec
from tornado.web import HTTPError, RequestHandler, stream_request_body

from bitnet_ext.wire.messages import ErrorBody, Message
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.bodies import parse
from coordinator.service.feed import Feed
from coordinator.service.fleet import Fleet
from coordinator.service.lag import LoopLag

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
MAX_JSON_BYTES: Final = 64 * 1024
MAX_LOGS_BYTES: Final = 256 * 1024

#: Which HTTP status each error code is sent with.
STATUS: Final[dict[ErrorCode, int]] = {
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.BAD_REQUEST: 400,
    ErrorCode.PROTOCOL_MISMATCH: 400,
    ErrorCode.PRESET_MISMATCH: 409,
    ErrorCode.UNKNOWN_PRESET: 400,
    ErrorCode.UNKNOWN_WORKER: 404,
    ErrorCode.UNKNOWN_TASK: 404,
    ErrorCode.UNKNOWN_SHARD: 404,
    ErrorCode.UNKNOWN_VERSION: 404,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.LEASE_LOST: 409,
    ErrorCode.STALE_BASE: 409,
    ErrorCode.WRONG_LENGTH: 400,
    ErrorCode.NON_FINITE: 400,
    ErrorCode.BAD_FRAME: 400,
    ErrorCode.LAYOUT_MISMATCH: 409,
    ErrorCode.SUBMISSION_CONFLICT: 422,
    ErrorCode.UNSUPPORTED_MEDIA: 415,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.BAD_RANGE: 416,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.BUSY: 503,
    ErrorCode.NO_RUN: 503,
    ErrorCode.DISK_LOW: 503,
    ErrorCode.INTERNAL: 500,
}
# What Tornado itself refuses, before a handler of ours has a say.
_OWN_STATUS: Final = {
    401: ErrorCode.UNAUTHORIZED,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.TOO_LARGE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """What the routes work with."""

    fleet: Fleet
    feed: Feed
    lag: LoopLag
    #: SHA-256 of every worker key that is valid: the current one and the next.
    key_hashes: Collection[bytes]
    #: SHA-256 of the token that opens /metrics, /status and /ready, if one is set.
    metrics_hash: bytes | None
    #: Tells whether a request comes from an operator's browser, for our own host.
    is_operator: Callable[[RequestHandler], Awaitable[bool]]


def secret_hash(secret: str) -> bytes:
    """Return what a key is compared by: all of one length, and not the key."""
    return hashlib.sha256(secret.encode()).digest()


def is_one_of(given: str, hashes: Collection[bytes]) -> bool:
    """Compare a key in constant time with each that is valid."""
    asked = secret_hash(given)
    # A list: every comparison is made, whichever fits.
    return any([hmac.compare_digest(asked, known) for known in hashes])


@stream_request_body
class ApiHandler(RequestHandler):
    """Base of every route. Answers are JSON, and so are refusals.

    `prepare` runs before the body is read: strangers can't make us hold theirs.
    """

    #: The largest body that the route takes.
    max_body_bytes: ClassVar[int] = MAX_JSON_BYTES

    # Tornado makes handlers through initialize(), not through a constructor.
    def initialize(self, api: Api) -> None:
        """Take the collaborators of the route."""
        self.api = api
        self._pieces: list[bytes] = []

    def set_default_headers(self) -> None:
        """Say nothing of the server and its clock; let browsers keep nothing."""
        self.clear_header("Server")
        self.clear_header("Date")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")

    async def prepare(self) -> None:
        """Let in who has a worker's key. Raises RefusedError `unauthorized`."""
        self.check_key()
        self.check_size()
        # Who has a key is no browser. A refusal has them again: a browser may get one.
        self.clear_header("Cache-Control")
        self.clear_header("X-Content-Type-Options")

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Keep the next bytes of the body."""
        self._pieces.append(chunk)
        return None

    def check_size(self) -> None:
        """Raise RefusedError `too_large` for a body that says it is; cut off others."""
        size = self.request.headers.get("Content-Length", "0")
        connection: Any = self.request.connection
        connection.set_max_body_size(self.max_body_bytes)
        # More digits than any size has would take long to turn into a number.
        if len(size) > 18 or (size.isdecimal() and int(size) > self.max_body_bytes):
            raise RefusedError(
                ErrorCode.TOO_LARGE,
                f"body must have at most {self.max_body_bytes} bytes, got {size[:18]}",
                field="body",
            )

    def check_key(self) -> None:
        """Raise RefusedError unless exactly one valid `X-Api-Key` came along."""
        given = self.request.headers.get_list("X-Api-Key")
        if len(given) != 1 or not is_one_of(given[0], self.api.key_hashes):
            raise RefusedError(
                ErrorCode.UNAUTHORIZED,
                "X-Api-Key must be the key of this coordinator's workers",
                field="X-Api-Key",
            )

    def body(self, kind: type[M]) -> M:
        """Return the JSON body. Raises RefusedError that names the field."""
        check_content_type(self.request.headers.get("Content-Type"), JSON)
        return parse(b"".join(self._pieces), kind)

    def answer(self, message: object, status: int = 200) -> None:
        """Answer with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", JSON)
        self.finish(msgspec.json.encode(message))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer a refusal, or whatever went wrong, as an `ErrorBody`."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        refused = as_refusal(status_code, error)
        if refused.code is ErrorCode.INTERNAL:
            self.set_status(500)
        else:
            self.set_status(STATUS.get(refused.code, status_code))
        if refused.retry_after_s is not None:
            self.set_header("Retry-After", str(max(1, round(refused.retry_after_s))))
        self.set_header("Content-Type", JSON)
        self.finish(
            msgspec.json.encode(
                ErrorBody(
                    code=refused.code, message=refused.message, field=refused.field
                )
            )
        )

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log bugs with their story, refusals in one line."""
        if isinstance(value, RefusedError):
            log.info(
                "refused: %s",
                value.message,
                extra={
                    "event": "request.refused",
                    "code": value.code,
                    "field": value.field,
                    "path": self.request.path,
                },
            )
        elif not isinstance(value, HTTPError):
            log.error(
                "a request failed",
                exc_info=(typ, value, tb),
                extra={"event": "request.failed", "path": self.request.path},
            )


class StatusHandler(ApiHandler):
    """Base of what operators and their tools may read: key, token or session."""

    async def prepare(self) -> None:
        """Let in who has a key, the metrics token or a session."""
        if await self._may_read():
            return
        raise RefusedError(
            ErrorCode.UNAUTHORIZED,
            "a worker's X-Api-Key, the metrics token or a login is needed",
            field="Authorization",
        )

    async def _may_read(self) -> bool:
        if self._has_token():
            return True
        given = self.request.headers.get("X-Api-Key")
        if given is not None and is_one_of(given, self.api.key_hashes):
            return True
        return await self.api.is_operator(self)

    def _has_token(self) -> bool:
        scheme, _, token = self.request.headers.get("Authorization", "").partition(" ")
        hashes = [] if self.api.metrics_hash is None else [self.api.metrics_hash]
        return scheme.lower() == "bearer" and is_one_of(token, hashes)


class UnknownRoute(ApiHandler):
    """Whatever no route answers."""

    async def prepare(self) -> None:
        """Refuse."""
        raise RefusedError(ErrorCode.NOT_FOUND, "there is no such route")


def check_content_type(got: str | None, due: str) -> None:
    """Raise RefusedError `unsupported_media` for another type of body."""
    kind = (got or "").partition(";")[0].strip().lower()
    if kind != due:
        raise RefusedError(
            ErrorCode.UNSUPPORTED_MEDIA,
            f"Content-Type must be {due}, got {got!r}",
            field="Content-Type",
        )


def as_refusal(status: int, error: BaseException | None) -> RefusedError:
    """Return what is sent of an error: never the text of a bug."""
    if isinstance(error, RefusedError):
        return error
    if status in _OWN_STATUS:
        code = _OWN_STATUS[status]
        return RefusedError(code, code.replace("_", " "))
    if status < 500:
        return RefusedError(ErrorCode.BAD_REQUEST, "bad request")
    return RefusedError(ErrorCode.INTERNAL, "internal error; the log has the story")
