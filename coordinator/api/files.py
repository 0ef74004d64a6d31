"""`GET /weights/{version}` and `GET /corpus/{shard_id}`: whole files or one Range."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.api.base import Api, ApiHandler
from coordinator.domain.errors import RefusedError
from coordinator.service.serving import Source, open_shard, open_weights

_CHUNK_BYTES: Final = 1 << 19
_VERSION: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_RANGE: Final = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stretch:
    """The bytes from `first` to before `end`."""

    first: int
    end: int


def wanted(range_header: str | None, num_bytes: int) -> Stretch | None:
    """Return the stretch that a `Range` header asks for; None for the whole file.

    Several ranges, other units, suffixes and one that ends before it begins count
    as no Range (RFC 9110, 14.1.1 and 14.2). Raises RefusedError `bad_range` for one
    that begins beyond the end.
    """
    match = _RANGE.fullmatch((range_header or "").strip())
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2]) if match[2] else num_bytes - 1
    if match[2] and last < first:
        return None
    if first >= num_bytes:
        raise RefusedError(
            ErrorCode.BAD_RANGE,
            f"Range must begin within {num_bytes} bytes, got {range_header!r}",
            field="Range",
        )
    return Stretch(first, min(last + 1, num_bytes))


class FileHandler(ApiHandler):
    """Base of both routes."""

    #: Size of the file whose Range was asked for.
    _num_bytes: int | None = None

    async def serve(self, source: Source) -> None:
        """Answer with the file, or with the Range that was asked for; close it."""
        try:
            stretch = self._set_answer(source)
            if stretch is not None:
                await self._send(source, stretch)
        finally:
            await self.api.fleet.off_loop(source.close)

    def _set_answer(self, source: Source) -> Stretch | None:
        """Set status and headers; return what to send, None for nothing."""
        self.set_header("Content-Type", source.content_type)
        etag = None if source.sha256 is None else f'"sha256-{source.sha256}"'
        if etag is None:
            self.set_header("Cache-Control", "no-store")
        else:
            self.set_header("ETag", etag)
            self.set_header("Cache-Control", "private, immutable, max-age=31536000")
            if self.request.headers.get("If-None-Match") == etag:
                self.set_status(304)
                return None
        part = None
        if self.request.headers.get("If-Range", etag) == etag:
            self._num_bytes = source.num_bytes
            part = wanted(self.request.headers.get("Range"), source.num_bytes)
        stretch = part or Stretch(0, source.num_bytes)
        if part is not None:
            self.set_status(206)
            self.set_header(
                "Content-Range",
                f"bytes {part.first}-{part.end - 1}/{source.num_bytes}",
            )
        self.set_header("Content-Length", str(stretch.end - stretch.first))
        return stretch

    async def _send(self, source: Source, stretch: Stretch) -> None:
        """Send piece by piece, as fast as the other side takes it."""
        position = stretch.first
        try:
            while position < stretch.end:
                size = min(_CHUNK_BYTES, stretch.end - position)
                piece = await self.api.fleet.off_loop(
                    lambda at=position, size=size: source.read(  # type: ignore[misc]
                        at, size
                    )
                )
                if not piece:
                    raise OSError(f"file ends at {position}, before {stretch.end}")
                self.write(piece)
                await self.flush()
                position += len(piece)
        except StreamClosedError:
            return

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Say how long the file is, where the Range lies beyond it (RFC 9110)."""
        if self._num_bytes is not None:
            self.set_header("Content-Range", f"bytes */{self._num_bytes}")
        super().write_error(status_code, **kwargs)

    def compute_etag(self) -> None:
        """Leave the ETag to `serve`: Tornado's own would need the whole body."""


class WeightsHandler(FileHandler):
    """`/weights/{version}`: the published frame of a version, or links."""

    async def get(self, version: str) -> None:
        """Answer with the frame, or with the links from the version that is held."""
        held = self.get_query_arguments("from")
        if held and (len(held) > 1 or _VERSION.fullmatch(held[0]) is None):
            raise RefusedError(
                ErrorCode.BAD_REQUEST,
                f"from must be one version, got {', '.join(held)!r}",
                field="from",
            )
        source = await open_weights(
            self.api.fleet, int(version), int(held[0]) if held else None
        )
        await self.serve(source)


class CorpusHandler(FileHandler):
    """`/corpus/{shard_id}`: a shard, tokens or text."""

    async def get(self, shard_id: str) -> None:
        """Answer with the file."""
        await self.serve(await open_shard(self.api.fleet, shard_id))


def file_routes(api: Api) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    with_api = {"api": api}
    return [
        (r"/weights/([0-9]{1,18})", WeightsHandler, with_api),
        # Everything after the prefix: what is no id must get the refusal of one.
        (r"/corpus/(.+)", CorpusHandler, with_api),
    ]
