"""The blobs of a version: what workers hold, and what the coordinator needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.chain import add_links, published_sha256
from bitnet_ext.codecs import Codec, PayloadError, decode, fp32_payload
from bitnet_ext.frames import (
    FrameError,
    FrameHeader,
    FrameKind,
    decode_frame,
    frame_parts,
)
from bitnet_ext.memory import aligned
from coordinator.store.blobs import BlobKind, Blobs, Written, version_blob


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Master weights and momentum of a version, float32 (n,) each."""

    version: int
    weights: NDArray[np.float32]
    momentum: NDArray[np.float32]

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
        link = frame_parts(replace(header, kind=FrameKind.LINK, codec=codec), payload)
        blobs.write(BlobKind.LINK, version_blob(state.version), link)
    both = np.concatenate((state.weights, state.momentum))
    state_header = replace(header, kind=FrameKind.SERVER_STATE, num_elements=len(both))
    return VersionBlobs(
        published=_write(blobs, BlobKind.PUBLISHED, header, known.weights),
        state=_write(blobs, BlobKind.STATE, state_header, both),
    )


def _write(
    blobs: Blobs, kind: BlobKind, header: FrameHeader, vector: NDArray[np.float32]
) -> Written:
    payload = fp32_payload(vector)
    return blobs.write(kind, version_blob(header.version), frame_parts(header, payload))


def read_state(blobs: Blobs, version: int) -> ServerState:
    """Read the server state of a version. Blocking.

    Raises FrameError or PayloadError when the blob is damaged.
    """
    header, payload = decode_frame(blobs.read(BlobKind.STATE, version_blob(version)))
    both = decode(header.codec, payload, header.num_elements)
    weights, momentum = np.split(both, 2)
    return ServerState(version=version, weights=weights, momentum=momentum)


def read_published(blobs: Blobs, version: int) -> NDArray[np.float32]:
    """Read what workers hold of a version, float32 (n,). Blocking.

    Raises FrameError or PayloadError when the blob is damaged.
    """
    name = version_blob(version)
    header, payload = decode_frame(blobs.read(BlobKind.PUBLISHED, name))
    return decode(header.codec, payload, header.num_elements)


def remake_published(blobs: Blobs, version: int, sha256: str) -> None:
    """Write the published frame of a version anew, the same bytes. Blocking.

    Raises FrameError, PayloadError or OSError when what it can be made of is gone or
    damaged, or nothing can be written.
    """
    header, _ = decode_frame(blobs.read(BlobKind.STATE, version_blob(version)))
    layout = header.layout_hash
    for weights in _candidates(blobs, version, layout):
        if published_sha256(weights, layout_hash=layout, version=version) == sha256:
            made = replace(header, kind=FrameKind.WEIGHTS, num_elements=len(weights))
            _write(blobs, BlobKind.PUBLISHED, made, weights)
            return
    raise FrameError(f"nothing that is kept leads to version {version}")


def _candidates(
    blobs: Blobs, version: int, layout_hash: bytes
) -> Iterator[NDArray[np.float32]]:
    """Yield what may have been published: the master weights, or the chain's end."""
    yield read_state(blobs, version).weights
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
