"""The chain: a published version follows from the one before it, to the bit.

A *link* is the coded difference between the master weights and what workers hold:

    link      = encode(master - published)
    published <- published + decode(link)

What a link rounds away stays in that difference, and so is part of the next: error
feedback that needs no memory of its own. Both sides run the same additions, each
rounded once to float32: whoever holds a version and adds the links that follow holds
the very bytes of the newer frame.
"""

from __future__ import annotations

import hashlib

import numpy as np

from bitnet_ext.codecs import (
    Bytes,
    Codec,
    Vector,
    decode_add,
    encode_into,
    fp32_payload,
    payload_bytes,
)
from bitnet_ext.frames import (
    FrameError,
    FrameHeader,
    FrameKind,
    LengthError,
    check_header,
    decode_frame,
    decode_header,
    frame_bytes,
    frame_parts,
)
from bitnet_ext.memory import aligned


def next_link(codec: Codec, master: Vector, published: Vector) -> bytes:
    """Return the payload of the link that brings `published` towards `master`.

    Both are float32 (n,); `published` becomes the version that the link leads to.
    Raises NonFiniteError, with `published` as it was, where the difference is not
    finite or too large for the codec.
    """
    payload = aligned(payload_bytes(codec, master.size), np.uint8)
    encode_into(codec, master, payload, minus=published)
    link = payload.tobytes()
    decode_add(codec, link, published, 1.0)
    return link


def add_links(
    links: Bytes, weights: Vector, *, layout_hash: bytes, held: int, version: int
) -> None:
    """Bring `weights`, float32 (n,), from version `held` to `version`, in place.

    `links` are whole frames, one after the other. Raises FrameError or PayloadError
    unless they are exactly the links from `held + 1` to `version` of this model;
    `weights` is then undefined.
    """
    left = memoryview(links).cast("B").toreadonly()
    for number in range(held + 1, version + 1):
        said = decode_header(left)
        size = frame_bytes(said.codec, said.num_elements)
        header, payload = decode_frame(left[:size])
        check_header(
            header,
            kind=FrameKind.LINK,
            layout_hash=layout_hash,
            num_elements=weights.size,
        )
        if header.version != number:
            raise FrameError(f"link: version must be {number}, got {header.version}")
        decode_add(header.codec, payload, weights, 1.0)
        left = left[size:]
    if left.nbytes:
        raise LengthError(f"{left.nbytes} bytes follow the link to version {version}")


def published_sha256(weights: Vector, *, layout_hash: bytes, version: int) -> str:
    """Return the SHA-256, in hexadecimal, of the published frame of `weights`."""
    header = FrameHeader(
        kind=FrameKind.WEIGHTS,
        codec=Codec.FP32,
        layout_hash=layout_hash,
        version=version,
        num_elements=weights.size,
    )
    digest = hashlib.sha256()
    for part in frame_parts(header, fp32_payload(weights)):
        digest.update(part)
    return digest.hexdigest()
