"""Header + payload + SHA-256: the only binary format on the wire and on disk.

All numbers are little-endian; offsets and lengths in bytes:

| offset | length | what |
|---|---|---|
| 0 | 4 | magic `BNFR` |
| 4 | 2 | format version, 1 |
| 6 | 1 | kind |
| 7 | 1 | codec |
| 8 | 8 | weight version; the base version of a delta or a gradient |
| 16 | 8 | number of elements |
| 24 | 8 | length of the payload |
| 32 | 32 | layout hash |
| 64 | p | payload, as `codecs` writes it |
| 64 + p | 32 | SHA-256 of all that precedes |
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from bitnet_ext.codecs import Bytes, Codec, payload_bytes

MAGIC: Final = b"BNFR"
FORMAT_VERSION: Final = 1
HEADER_BYTES: Final = 64
TRAILER_BYTES: Final = 32
LAYOUT_HASH_BYTES: Final = 32
#: Versions and element counts stay below: far above any use, far below overflow.
LIMIT: Final = 1 << 48

_HEADER: Final = struct.Struct("<4sHBBQQQ32s")


class FrameKind(StrEnum):
    """What the numbers of a frame are."""

    WEIGHTS = "weights"  #: a published version: n elements
    DELTA = "delta"  #: base minus trained, after K local steps: n elements
    GRADIENT = "gradient"  #: the gradient at the base version: n elements
    #: fp32 master weights, then momentum: *2n* elements, never sent to workers.
    SERVER_STATE = "server_state"
    #: The same in gradient rounds, then the mean of squares of AdamW: *3n* elements.
    GRADIENT_STATE = "gradient_state"
    #: A published version minus the one before it, as coded: n elements.
    LINK = "link"
    #: What a worker's codec rounded away of deltas: n elements; stays on its disk.
    RESIDUAL = "residual"
    #: The same of gradients.
    GRADIENT_RESIDUAL = "gradient_residual"
    #: Both moments of AdamW, then steps by segment: 2n + s elements; as the residual.
    MOMENTS = "moments"

    @property
    def number(self) -> int:
        """The byte that stands for it in a frame; never reused."""
        return _KIND_NUMBERS[self]


_KIND_NUMBERS: Final = {
    FrameKind.WEIGHTS: 1,
    FrameKind.DELTA: 2,
    FrameKind.GRADIENT: 3,
    FrameKind.SERVER_STATE: 4,
    FrameKind.GRADIENT_STATE: 5,
    FrameKind.LINK: 6,
    FrameKind.RESIDUAL: 7,
    FrameKind.MOMENTS: 8,
    FrameKind.GRADIENT_RESIDUAL: 9,
}
_KINDS: Final = {number: kind for kind, number in _KIND_NUMBERS.items()}
_CODECS: Final = {codec.number: codec for codec in Codec}


class FrameError(ValueError):
    """Bytes that are no frame: magic, version, kind, codec or checksum."""


class LengthError(FrameError):
    """A frame, its payload or its vector has another length than it should."""


class LayoutError(FrameError):
    """A frame of another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """What a frame says of its payload. Raises ValueError, naming the field."""

    kind: FrameKind
    codec: Codec
    #: 32 bytes, see `bitnet_ext.layout.layout_hash`.
    layout_hash: bytes
    #: Weight version; for a delta or a gradient the version it starts from.
    version: int
    #: Numbers in the payload; of a server state two or three flat vectors.
    num_elements: int

    def __post_init__(self) -> None:
        if len(self.layout_hash) != LAYOUT_HASH_BYTES:
            raise ValueError(
                f"layout_hash must be {LAYOUT_HASH_BYTES} bytes, "
                f"got {len(self.layout_hash)}"
            )
        for field in ("version", "num_elements"):
            value = getattr(self, field)
            if not 0 <= value < LIMIT:
                raise ValueError(f"{field} must be from 0 to 2**48 - 1, got {value}")

    @property
    def payload_bytes(self) -> int:
        """Length of the payload: the codec and the number of elements decide it."""
        return payload_bytes(self.codec, self.num_elements)


def frame_bytes(codec: Codec, num_elements: int) -> int:
    """Return the length of a whole frame of that many numbers, in bytes."""
    return HEADER_BYTES + payload_bytes(codec, num_elements) + TRAILER_BYTES


def encode_frame(header: FrameHeader, payload: Bytes) -> bytes:
    """Return the whole frame. Raises LengthError when the payload is not as long."""
    return b"".join(frame_parts(header, payload))


def frame_parts(header: FrameHeader, payload: Bytes) -> list[Bytes]:
    """Return header, payload and trailer, to be written one after the other.

    As `encode_frame`, without a copy of the payload.
    """
    parts = sealed_parts(header, payload)
    return [*parts, _digest(*parts)]


def sealed_parts(header: FrameHeader, *payload: Bytes) -> list[Bytes]:
    """Return what the trailer is the SHA-256 of: the header and a payload in pieces.

    For who hashes what is written in any case. Raises LengthError when the pieces are
    not as long together as the header says.
    """
    views = [memoryview(piece).cast("B") for piece in payload]
    num_bytes = sum(view.nbytes for view in views)
    if num_bytes != header.payload_bytes:
        raise LengthError(
            f"payload must have {header.payload_bytes} bytes for "
            f"{header.num_elements} numbers of {header.codec}, got {num_bytes}"
        )
    head = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        header.kind.number,
        header.codec.number,
        header.version,
        header.num_elements,
        num_bytes,
        header.layout_hash,
    )
    return [head, *views]


def decode_frame(data: Bytes) -> tuple[FrameHeader, memoryview]:
    """Return the header and a read-only view of the payload of a whole frame.

    Nothing is allocated, and nothing hashed, before every field and length has been
    checked. Raises LengthError for a frame of another length than its header says,
    FrameError for anything else. The payload's own bytes are checked by `codecs`.
    """
    header, payload = split_frame(data)
    view = memoryview(data).cast("B")
    if _digest(view[:HEADER_BYTES], payload) != view[-TRAILER_BYTES:]:
        raise FrameError("the checksum does not match: the frame is damaged")
    return header, payload


def split_frame(data: Bytes) -> tuple[FrameHeader, memoryview]:
    """Do the same without the checksum: for what was checked a moment ago."""
    view = memoryview(data).cast("B").toreadonly()
    header = decode_header(view)
    expected = HEADER_BYTES + header.payload_bytes + TRAILER_BYTES
    if view.nbytes != expected:
        raise LengthError(f"frame must have {expected} bytes, got {view.nbytes}")
    return header, view[HEADER_BYTES:-TRAILER_BYTES]


def decode_header(data: Bytes) -> FrameHeader:
    """Return the header at the start of a frame; the rest may be yet to come.

    Raises LengthError when fewer than HEADER_BYTES are there or the lengths in the
    header contradict each other, FrameError for an unknown value.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < HEADER_BYTES:
        raise LengthError(
            f"frame must have at least {HEADER_BYTES} bytes, got {view.nbytes}"
        )
    magic, form, kind, codec, version, count, length, layout = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"magic must be {MAGIC!r}, got {magic!r}")
    if form != FORMAT_VERSION:
        raise FrameError(f"format version must be {FORMAT_VERSION}, got {form}")
    if kind not in _KINDS:
        raise FrameError(f"kind must be one of {sorted(_KINDS)}, got {kind}")
    if codec not in _CODECS:
        raise FrameError(f"codec must be one of {sorted(_CODECS)}, got {codec}")
    if version >= LIMIT:
        raise FrameError(f"version must be below 2**48, got {version}")
    if count >= LIMIT:
        raise LengthError(f"num_elements must be below 2**48, got {count}")
    header = FrameHeader(
        kind=_KINDS[kind],
        codec=_CODECS[codec],
        layout_hash=layout,
        version=version,
        num_elements=count,
    )
    if length != header.payload_bytes:
        raise LengthError(
            f"payload_bytes must be {header.payload_bytes} for {count} numbers of "
            f"{header.codec}, got {length}"
        )
    return header


def check_header(
    header: FrameHeader, *, kind: FrameKind, layout_hash: bytes, num_elements: int
) -> None:
    """Raise unless the frame is of this kind, this model and this length.

    Raises FrameError for the kind, LayoutError for the layout hash, LengthError for
    the number of elements.
    """
    if header.kind is not kind:
        raise FrameError(f"kind must be {kind}, got {header.kind}")
    if header.layout_hash != layout_hash:
        raise LayoutError(
            f"layout_hash must be {layout_hash.hex()}, got {header.layout_hash.hex()}"
        )
    if header.num_elements != num_elements:
        raise LengthError(
            f"num_elements must be {num_elements}, got {header.num_elements}"
        )


def _digest(*parts: Bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
