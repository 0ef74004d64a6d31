"""The blobs of a version: what workers hold, and what the coordinator needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.chain import add_links, published_sha256
from bitnet_ext.codecs import Bytes, Codec, PayloadError, decode, fp32_payload
from bitnet_ext.frames import (
    FrameError,
    FrameHeader,
    FrameKind,
    decode_frame,
    sealed_parts,
)
from bitnet_ext.memory import aligned
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.store.blobs import BlobKind, Blobs, Written, version_blob
from coordinator.store.rows import VersionRow

_FOLDERS: Final = {
    FrameKind.WEIGHTS: BlobKind.PUBLISHED,
    FrameKind.LINK: BlobKind.LINK,
    FrameKind.SERVER_STATE: BlobKind.STATE,
    FrameKind.GRADIENT_STATE: BlobKind.STATE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Master weights and momentum of a version, float32 (n,) each."""

    version: int
    weights: NDArray[np.float32]
    momentum: NDArray[np.float32]
    #: After a gradient step: the mean of squares of AdamW; None after an outer step. So
    #: a state shows which kind of step its momentum is of.
    square: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, num_params: int) -> ServerState:
        """Return memory for a state, of version 0."""
        weights, momentum = np.split(aligned(2 * num_params, np.float32), 2)
        return cls(version=0, weights=weights, momentum=momentum)


@dataclass(frozen=True, slots=True)
class Link:
    """What leads to a version from the one before: a payload of its codec."""

    codec: Codec
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What workers hold of a version, float32 (n,)."""

    version: int
    weights: NDArray[np.float32]
    #: None where it is the master weights themselves.
    link: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionBlobs:
    """Published frame and server state of a version, durable."""

    published: Written
    state: Written


def first_state(
    version: int, weights: NDArray[np.float32], round_kind: RoundKind
) -> ServerState:
    """Return the state of a run that has made no step yet."""
    has_square = round_kind is RoundKind.GRADIENT
    return ServerState(
        version=version,
        weights=weights,
        momentum=np.zeros_like(weights),
        square=np.zeros_like(weights) if has_square else None,
    )


def write_version(
    blobs: Blobs,
    state: ServerState,
    layout_hash: bytes,
    published: Published | None = None,
) -> VersionBlobs:
    """Write all blobs durably; the row that names them comes after. Blocking.

    Workers get the master weights where nothing else is to be published.
    """
    known = published or Published(version=state.version, weights=state.weights)
    header = FrameHeader(
        kind=FrameKind.WEIGHTS,
        codec=Codec.FP32,
        layout_hash=layout_hash,
        version=state.version,
        num_elements=len(state.weights),
    )
    if known.link is not None:
        codec, payload = known.link.codec, known.link.payload
        _write(blobs, replace(header, kind=FrameKind.LINK, codec=codec), payload)
    kind, vectors = FrameKind.SERVER_STATE, [state.weights, state.momentum]
    if state.square is not None:
        kind, vectors = FrameKind.GRADIENT_STATE, [*vectors, state.square]
    state_header = replace(header, kind=kind, num_elements=sum(map(len, vectors)))
    return VersionBlobs(
        published=_write(blobs, header, fp32_payload(known.weights)),
        state=_write(blobs, state_header, *map(fp32_payload, vectors)),
    )


def _write(blobs: Blobs, header: FrameHeader, *payload: Bytes) -> Written:
    """Write a frame, its payload in pieces, where frames of its kind lie."""
    parts = sealed_parts(header, *payload)
    return blobs.write_frame(_FOLDERS[header.kind], version_blob(header.version), parts)


def read_state(blobs: Blobs, version: int) -> ServerState:
    """Read the server state of a version. Blocking.

    Raises FrameError or PayloadError when the blob is damaged.
    """
    header, payload = decode_frame(blobs.read(BlobKind.STATE, version_blob(version)))
    joined = decode(header.codec, payload, header.num_elements)
    if header.kind is FrameKind.SERVER_STATE:
        weights, momentum = np.split(joined, 2)
        return ServerState(version=version, weights=weights, momentum=momentum)
    weights, momentum, square = np.split(joined, 3)
    return ServerState(
        version=version, weights=weights, momentum=momentum, square=square
    )


def read_published(blobs: Blobs, version: int) -> NDArray[np.float32]:
    """Read what workers hold of a version, float32 (n,). Blocking.

    Raises FrameError or PayloadError when the blob is damaged.
    """
    name = version_blob(version)
    header, payload = decode_frame(blobs.read(BlobKind.PUBLISHED, name))
    return decode(header.codec, payload, header.num_elements)


def fault_of(blobs: Blobs, row: VersionRow) -> str | None:
    """Return what is wrong with the blobs of a version; None: nothing. Blocking."""
    for kind, num_bytes, sha256 in (
        (BlobKind.PUBLISHED, row.published_bytes, row.published_sha256),
        (BlobKind.STATE, row.state_bytes, row.state_sha256),
    ):
        name = f"{kind}/{version_blob(row.version)}"
        try:
            content = blobs.read(kind, version_blob(row.version))
        except OSError as error:
            return f"{name}: {error.strerror}"
        if len(content) != num_bytes:
            return f"{name} must have {num_bytes} bytes, has {len(content)}"
        if hashlib.sha256(content).hexdigest() != sha256:
            return f"{name} does not have its SHA-256"
    return None


def remake_published(blobs: Blobs, row: VersionRow) -> None:
    """Write the published frame of a version anew, the same bytes. Blocking.

    Raises FrameError, PayloadError or OSError when what it can be made of is gone or
    damaged, or nothing can be written.
    """
    version = row.version
    header, _ = decode_frame(blobs.read(BlobKind.STATE, version_blob(version)))
    layout = header.layout_hash
    for weights in _candidates(blobs, row, layout):
        found = published_sha256(weights, layout_hash=layout, version=version)
        if found == row.published_sha256:
            made = replace(header, kind=FrameKind.WEIGHTS, num_elements=len(weights))
            _write(blobs, made, fp32_payload(weights))
            return
    raise FrameError(f"nothing that is kept leads to version {version}")


def _candidates(
    blobs: Blobs, row: VersionRow, layout_hash: bytes
) -> Iterator[NDArray[np.float32]]:
    """Yield what may have been published: master weights, an old version, a link's."""
    version = row.version
    yield read_state(blobs, version).weights
    with suppress(OSError, FrameError, PayloadError):
        if row.rolled_back_to is not None:
            yield read_published(blobs, row.rolled_back_to)
    with suppress(OSError, FrameError, PayloadError):
        weights = read_published(blobs, version - 1)
        link = blobs.read(BlobKind.LINK, version_blob(version))
        add_links(
            link, weights, layout_hash=layout_hash, held=version - 1, version=version
        )
        yield weights


def remove_version(blobs: Blobs, version: int) -> None:
    """Remove all blobs of a version. Blocking."""
    for kind in (BlobKind.PUBLISHED, BlobKind.LINK, BlobKind.STATE):
        blobs.remove(kind, [version_blob(version)])
