"""`POST /gradient`: a submission, streamed to disk while it arrives."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from tornado.web import RequestHandler

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.api.base import BYTES, Api, ApiHandler, check_content_type
from coordinator.domain.errors import RefusedError
from coordinator.service.submitting import MAX_META_BYTES, Intake

log = logging.getLogger(__name__)

#: Uploads at a time. The next ones wait for a place, first come first served: work of a
#: round comes back at one time. Who waits longer is told to come again; the client of a
#: worker gives up sending after 5 s.
MAX_UPLOADS: Final = 16
PLACE_S: Final = 4.0
#: The largest frame taken: fp32 of a model of 250 million parameters.
MAX_BODY_BYTES: Final = 10**9 + MAX_META_BYTES
#: A body has to bring this much in each stretch: 70 kbit/s, or it has stalled.
STRETCH_BYTES: Final = 256 * 1024
STRETCH_S: Final = 30.0
#: ... and be here after this long.
UPLOAD_S: Final = 3600.0


class Uploads:
    """The places for bodies on their way in, and how slowly one may come."""

    def __init__(
        self,
        limit: int = MAX_UPLOADS,
        *,
        place_s: float = PLACE_S,
        stretch_s: float = STRETCH_S,
        stretch_bytes: int = STRETCH_BYTES,
    ) -> None:
        self._limit = limit
        self._places = asyncio.Semaphore(limit)
        self._place_s = place_s
        self.stretch_s = stretch_s
        self.stretch_bytes = stretch_bytes

    async def enter(self) -> None:
        """Take a place, once there is one. Raises RefusedError `busy`."""
        try:
            async with asyncio.timeout(self._place_s):
                await self._places.acquire()
        except TimeoutError:
            raise RefusedError(
                ErrorCode.BUSY,
                f"{self._limit} submissions are on their way in, come again",
                retry_after_s=2.0,
            ) from None

    def leave(self) -> None:
        """Give a place back."""
        self._places.release()


class GradientHandler(ApiHandler):
    """One submission."""

    max_body_bytes = MAX_BODY_BYTES

    # Tornado makes handlers through initialize(), not through a constructor.
    def initialize(self, api: Api, uploads: Uploads) -> None:  # type: ignore[override]
        """Take the collaborators of the route."""
        super().initialize(api)
        self._uploads = uploads
        self._intake: Intake | None = None
        self._refused: RefusedError | None = None
        self._num_bytes = 0
        self._is_feeding = False
        self._watch: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        """Check the key, the type and the room before any of the body is read."""
        await super().prepare()
        check_content_type(self.request.headers.get("Content-Type"), BYTES)
        await self._uploads.enter()
        self._intake = Intake(self.api.fleet)
        connection: Any = self.request.connection
        connection.set_body_timeout(UPLOAD_S)
        self._watch = asyncio.create_task(self._cut_off_when_stalled())

    async def _cut_off_when_stalled(self) -> None:
        """Close the connection of a body that brings too little: others wait."""
        before = 0
        while True:
            await asyncio.sleep(self._uploads.stretch_s)
            # While we are the slow ones, nothing is read, whatever arrives.
            if not self._is_feeding:
                if self._num_bytes - before < self._uploads.stretch_bytes:
                    break
                before = self._num_bytes
        log.warning(
            "an upload has stalled after %d bytes and is cut off",
            self._num_bytes,
            extra={"event": "upload.stalled"},
        )
        connection: Any = self.request.connection
        connection.stream.close()

    async def data_received(self, chunk: bytes) -> None:
        """Take the next bytes; after a refusal the rest is read and dropped.

        Answering in the middle of a body would reset the connection, and the
        worker would never see why.
        """
        self._num_bytes += len(chunk)
        if self._intake is None or self._refused is not None:
            return
        self._is_feeding = True
        try:
            await self._intake.feed(chunk)
        except RefusedError as error:
            self._refused = error
        finally:
            self._is_feeding = False

    async def post(self) -> None:
        """Answer once the submission is durable and accepted, or refused.

        What has begun here is finished whether or not the worker still listens: it
        will ask again, and then gets the answer that was stored.
        """
        self._stop_watching()
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

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    def _leave(self) -> None:
        self._stop_watching()
        intake, self._intake = self._intake, None
        if intake is not None:
            self._uploads.leave()
            self._closing = asyncio.ensure_future(intake.close())


def gradient_routes(
    api: Api,
) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    return [(r"/gradient", GradientHandler, {"api": api, "uploads": Uploads()})]
