"""`POST /gradient`: a submission, streamed to disk while it arrives."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from tornado.httputil import HTTPServerRequest
from tornado.web import RequestHandler, stream_request_body

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.api.base import BYTES, Api, ApiHandler, check_content_type
from coordinator.domain.errors import RefusedError
from coordinator.service.submitting import MAX_META_BYTES, Intake

#: Uploads at a time; the next one is told to come again.
MAX_UPLOADS: Final = 16
#: The largest frame taken: fp32 of a model of 250 million parameters.
MAX_BODY_BYTES: Final = 10**9 + MAX_META_BYTES


class Uploads:
    """How many bodies are on their way in."""

    def __init__(self, limit: int = MAX_UPLOADS) -> None:
        self._limit = limit
        self._count = 0

    def enter(self) -> None:
        """Count one more. Raises RefusedError `busy`."""
        if self._count >= self._limit:
            raise RefusedError(
                ErrorCode.BUSY,
                f"{self._limit} submissions are on their way in, come again",
                retry_after_s=2.0,
            )
        self._count += 1

    def leave(self) -> None:
        """Count one less."""
        self._count -= 1


@stream_request_body
class GradientHandler(ApiHandler):
    """One submission."""

    # Tornado makes handlers through initialize(), not through a constructor.
    def initialize(self, api: Api, uploads: Uploads) -> None:  # type: ignore[override]
        """Take the collaborators of the route."""
        super().initialize(api)
        self._uploads = uploads
        self._intake: Intake | None = None
        self._refused: RefusedError | None = None

    async def prepare(self) -> None:
        """Check the key, the type and the room before any of the body is read."""
        self.check_key()
        check_content_type(self.request.headers.get("Content-Type"), BYTES)
        self._uploads.enter()
        self._intake = Intake(self.api.fleet)
        _set_limit(self.request)

    async def data_received(self, chunk: bytes) -> None:
        """Take the next bytes; after a refusal the rest is read and dropped.

        Answering in the middle of a body would reset the connection, and the
        worker would never see why.
        """
        if self._intake is None or self._refused is not None:
            return
        try:
            await self._intake.feed(chunk)
        except RefusedError as error:
            self._refused = error

    async def post(self) -> None:
        """Answer once the submission is durable and accepted, or refused.

        What has begun here is finished whether or not the worker still listens: it
        will ask again, and then gets the answer that was stored.
        """
        intake, self._intake = self._intake, None
        if intake is None:
            raise RefusedError(ErrorCode.BAD_REQUEST, "body is missing", field="body")
        try:
            if self._refused is not None:
                raise self._refused
            answer = await intake.finish()
        finally:
            self._uploads.leave()
            await intake.close()
        self.answer(answer)

    def on_finish(self) -> None:
        """Remove what arrived of a body that was refused before its end."""
        self._leave()

    def on_connection_close(self) -> None:
        """Remove what arrived of a body that broke off."""
        self._leave()

    def _leave(self) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            self._uploads.leave()
            self._closing = asyncio.ensure_future(intake.close())


def _set_limit(request: HTTPServerRequest) -> None:
    """Allow this one route a large body."""
    connection: Any = request.connection
    connection.set_max_body_size(MAX_BODY_BYTES)


def gradient_routes(
    api: Api,
) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    return [(r"/gradient", GradientHandler, {"api": api, "uploads": Uploads()})]
