"""The two blobs of a version: what workers hold, and what the coordinator needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import Codec, decode, fp32_payload
from bitnet_ext.frames import FrameHeader, FrameKind, decode_frame, frame_parts
from bitnet_ext.memory import aligned
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.store.blobs import BlobKind, Blobs, Written, version_blob


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Master weights and momentum of a version, float32 (n,) each."""

    version: int
    weights: NDArray[np.float32]
    momentum: NDArray[np.float32]
    #: Of gradient rounds: the mean of squares of AdamW; None in delta rounds.
    square: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, num_params: int) -> ServerState:
        """Return memory for a state, of version 0."""
        weights, momentum = np.split(aligned(2 * num_params, np.float32), 2)
        return cls(version=0, weights=weights, momentum=momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionBlobs:
    """Both blobs of a version, durable."""

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


def write_version(blobs: Blobs, state: ServerState, layout_hash: bytes) -> VersionBlobs:
    """Write both blobs durably; the row that names them comes after. Blocking."""
    header = FrameHeader(
        kind=FrameKind.WEIGHTS,
        codec=Codec.FP32,
        layout_hash=layout_hash,
        version=state.version,
        num_elements=len(state.weights),
    )
    kind, vectors = FrameKind.SERVER_STATE, [state.weights, state.momentum]
    if state.square is not None:
        kind, vectors = FrameKind.GRADIENT_STATE, [*vectors, state.square]
    joined = np.concatenate(vectors)
    state_header = replace(header, kind=kind, num_elements=len(joined))
    return VersionBlobs(
        published=_write(blobs, BlobKind.PUBLISHED, header, state.weights),
        state=_write(blobs, BlobKind.STATE, state_header, joined),
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
    joined = decode(header.codec, payload, header.num_elements)
    if header.kind is FrameKind.SERVER_STATE:
        weights, momentum = np.split(joined, 2)
        return ServerState(version=version, weights=weights, momentum=momentum)
    weights, momentum, square = np.split(joined, 3)
    return ServerState(
        version=version, weights=weights, momentum=momentum, square=square
    )


def remake_published(blobs: Blobs, version: int) -> Written:
    """Write the published frame of a version anew from its server state. Blocking.

    The same bytes as the first time. Raises FrameError or PayloadError when the state
    is damaged, OSError when it is gone or nothing can be written.
    """
    header, _ = decode_frame(blobs.read(BlobKind.STATE, version_blob(version)))
    state = read_state(blobs, version)
    return _write(
        blobs,
        BlobKind.PUBLISHED,
        replace(header, kind=FrameKind.WEIGHTS, num_elements=len(state.weights)),
        state.weights,
    )


def remove_version(blobs: Blobs, version: int) -> None:
    """Remove both blobs of a version. Blocking."""
    for kind in (BlobKind.PUBLISHED, BlobKind.STATE):
        blobs.remove(kind, [version_blob(version)])
