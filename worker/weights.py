"""Published weight versions in memory, each verified before anything reads it.

A version never changes, so one that was fetched is never asked for again; the
newest two are kept: the one that is trained from, and the one that is scored.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import Codec, PayloadError, decode
from bitnet_ext.frames import (
    FrameError,
    FrameKind,
    check_header,
    decode_frame,
    frame_bytes,
)
from bitnet_ext.layout import ModelShape, layout_hash, num_params
from bitnet_ext.wire.verdicts import ErrorCode
from worker.client import Download
from worker.errors import BadDownloadError, BadWeightsError, RefusedError

KEPT: Final = 2


class WeightCache:
    """The flat vectors of the latest versions asked for.

    `fetch` fills a Download or raises; it does the retrying.
    """

    def __init__(self, fetch: Callable[[Download], None]) -> None:
        self._fetch = fetch
        self._kept: OrderedDict[tuple[int, str, bytes], NDArray[np.float32]] = (
            OrderedDict()
        )

    def get(
        self,
        version: int,
        sha256: str,
        shape: ModelShape,
        on_bytes: Callable[[int], None],
    ) -> NDArray[np.float32]:
        """Return the flat vector of a version: float32, layout order, read-only.

        `sha256` is of the whole published frame. Raises BadWeightsError when the
        bytes, the header or the numbers are not those of this version and model.
        """
        key = (version, sha256, layout_hash(shape))
        if key not in self._kept:
            frame = self._download(version, sha256, shape, on_bytes)
            self._kept[key] = read_weights(frame, shape, version=version)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _download(
        self,
        version: int,
        sha256: str,
        shape: ModelShape,
        on_bytes: Callable[[int], None],
    ) -> bytearray:
        num_bytes = frame_bytes(Codec.FP32, num_params(shape))
        frame = bytearray(num_bytes)
        try:
            self._fetch(
                Download(
                    path=f"/weights/{version}",
                    start=0,
                    total=num_bytes,
                    sha256=sha256,
                    into=memoryview(frame),
                    on_bytes=on_bytes,
                )
            )
        except BadDownloadError as error:
            raise BadWeightsError(f"version {version}: {error}") from error
        except RefusedError as error:
            if error.code is ErrorCode.UNKNOWN_VERSION:
                raise BadWeightsError(f"version {version}: {error}") from error
            raise
        found = hashlib.sha256(frame).hexdigest()
        if found != sha256:
            raise BadWeightsError(
                f"version {version} must have SHA-256 {sha256}, got {found}"
            )
        return frame


def read_weights(
    frame: bytes | bytearray, shape: ModelShape, *, version: int | None = None
) -> NDArray[np.float32]:
    """Return the flat vector of a published frame: float32, read-only.

    Raises BadWeightsError when the frame is damaged, of another model, of another
    version than the one given, or holds numbers that are not finite.
    """
    try:
        header, payload = decode_frame(frame)
        check_header(
            header,
            kind=FrameKind.WEIGHTS,
            layout_hash=layout_hash(shape),
            num_elements=num_params(shape),
        )
        weights = decode(header.codec, payload, header.num_elements)
    except (FrameError, PayloadError) as error:
        raise BadWeightsError(f"weights: {error}") from error
    if version is not None and header.version != version:
        raise BadWeightsError(
            f"weights: version must be {version}, got {header.version}"
        )
    # Shared by every task of this version: a write would poison them all.
    weights.flags.writeable = False
    return weights
