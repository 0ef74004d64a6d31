"""HTTP/1.1 over one connection that is kept, for hundreds of clients in one process.

As light as it can be: what the client of a benchmark takes, the coordinator lacks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

#: Bytes read or written at a time.
_PIECE_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `body` is empty where its bytes were only to be counted."""

    status: int
    headers: dict[str, str]
    body: bytes
    num_bytes: int


class Connection:
    """Asks one server, one request after another; connects anew where it has to."""

    def __init__(self, port: int, **headers: str) -> None:
        self._port = port
        lines = [f"Host: 127.0.0.1:{port}", *(f"{k}: {v}" for k, v in headers.items())]
        self._head = "\r\n".join(lines)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self,
        method: str,
        path: str,
        *pieces: bytes,
        kind: str = "application/json",
        more: str = "",
        count_only: bool = False,
    ) -> Answer:
        """Send a request whose body is `pieces`, and return what is answered.

        `more` are header lines, each with its end. A server may close a connection
        that was idle: then the request is sent once more. Raises OSError.
        """
        length = sum(map(len, pieces))
        if pieces:
            more += f"Content-Type: {kind}\r\nContent-Length: {length}\r\n"
        head = f"{method} {path} HTTP/1.1\r\n{self._head}\r\n{more}\r\n".encode()
        was_kept = self._streams is not None
        try:
            return await self._once((head, *pieces), count_only)
        except (OSError, EOFError):
            self.close()
            if not was_kept:
                raise
        return await self._once((head, *pieces), count_only)

    async def _once(self, pieces: tuple[bytes, ...], count_only: bool) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        for piece in pieces:
            view = memoryview(piece)
            for at in range(0, len(view), _PIECE_BYTES):
                writer.write(view[at : at + _PIECE_BYTES])
                await writer.drain()
        return await self._read(reader, count_only)

    async def _read(self, reader: asyncio.StreamReader, count_only: bool) -> Answer:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("closed before an answer") from error
        first, *lines = head.split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        status, length = int(first.split()[1]), int(headers.get("content-length", "0"))
        is_counted = count_only and status < 300
        body = b"" if is_counted else await reader.readexactly(length)
        left = length - len(body)
        while left:
            piece = await reader.read(min(left, _PIECE_BYTES))
            if not piece:
                raise ConnectionError(f"closed {left} bytes before the end")
            left -= len(piece)
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Answer(status, headers, body, length)

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
