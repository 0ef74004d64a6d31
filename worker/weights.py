"""Published weight versions in memory, each verified before anything reads it.

A version never changes, so one that was fetched is never asked for again; the
newest two are kept: the one that is trained from, and the one that is scored. A newer
one is made of a held one by links where the coordinator sends such. It must then have
the very bytes of the published frame; else that is fetched whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.chain import add_links, published_sha256
from bitnet_ext.codecs import Codec, PayloadError, decode
from bitnet_ext.frames import (
    FrameError,
    FrameKind,
    check_header,
    decode_frame,
    frame_bytes,
)
from bitnet_ext.layout import ModelShape, layout_hash, num_params
from bitnet_ext.wire.messages import EXACT
from bitnet_ext.wire.verdicts import ErrorCode
from worker.client import Download
from worker.errors import BadDownloadError, BadWeightsError, RefusedError
from worker.shelf import Kept, Owner, Shelf

log = logging.getLogger(__name__)

KEPT: Final = 2


@dataclass(frozen=True, slots=True)
class Version:
    """A published version that is wanted."""

    run_id: str
    number: int
    #: Of the whole published frame, in hexadecimal.
    sha256: str
    shape: ModelShape
    #: Codec of the links that lead there; any other word: it comes whole.
    broadcast: str = field(default=EXACT, compare=False)

    @property
    def owner(self) -> Owner:
        """What its vector belongs to."""
        return Owner(self.run_id, layout_hash(self.shape))


class WeightCache:
    """The flat vectors of the latest versions asked for.

    `fetch` fills a Download or raises; it does the retrying. Where versions follow
    from each other by links, the newest is kept on the shelf: a process that starts
    again goes on from it.
    """

    def __init__(self, fetch: Callable[[Download], None], shelf: Shelf) -> None:
        self._fetch = fetch
        self._shelf = shelf
        self._kept: OrderedDict[Version, NDArray[np.float32]] = OrderedDict()

    def get(
        self, version: Version, on_bytes: Callable[[int], None]
    ) -> NDArray[np.float32]:
        """Return the flat vector of a version: float32, layout order, read-only.

        One that is held already is brought there by the links in between, where those
        are shorter than the whole. Raises BadWeightsError when the bytes, the header
        or the numbers are not those of this version and model.
        """
        if not self._kept and version.broadcast != EXACT:
            self._read(version)
        if version not in self._kept:
            weights = self._by_links(version, on_bytes)
            if weights is None:
                frame = self._whole(version, on_bytes)
                weights = read_weights(frame, version.shape, version=version.number)
            self._keep(version, weights)
            self._write(version, weights)
        self._kept.move_to_end(version)
        return self._kept[version]

    def _keep(self, version: Version, weights: NDArray[np.float32]) -> None:
        # Shared by every task of this version: a write would poison them all.
        weights.flags.writeable = False
        self._kept[version] = weights
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _write(self, version: Version, weights: NDArray[np.float32]) -> None:
        """Put a version on the shelf where links may lead on from it."""
        is_newest = version.number == max(held.number for held in self._kept)
        if is_newest and version.broadcast != EXACT:
            kept = Kept(weights, version.number)
            self._shelf.put(version.owner, FrameKind.WEIGHTS, kept)

    def _read(self, version: Version) -> None:
        """Take from the shelf what an earlier process held of this run and model."""
        owner, size = version.owner, num_params(version.shape)
        kept = self._shelf.get(owner, FrameKind.WEIGHTS, size)
        if kept is not None:
            sha256 = published_sha256(
                kept.vector, layout_hash=owner.layout_hash, version=kept.version
            )
            held = replace(version, number=kept.version, sha256=sha256)
            self._keep(held, kept.vector)

    def _by_links(
        self, version: Version, on_bytes: Callable[[int], None]
    ) -> NDArray[np.float32] | None:
        """Return what the links make of a held version; None where it comes whole."""
        held = self._nearest(version)
        num_bytes = 0 if held is None else _links_bytes(version, held.number)
        if held is None or not num_bytes:
            return None
        path = f"/weights/{version.number}?from={held.number}"
        try:
            links = self._download(path, num_bytes, None, on_bytes)
            return _following(version, held.number, self._kept[held].copy(), links)
        except BadWeightsError as error:
            log.warning(
                "version %d is fetched whole, its links are of no use: %s",
                version.number,
                error,
                extra={"event": "links.refused", "version": version.number},
            )
            return None

    def _nearest(self, version: Version) -> Version | None:
        """Return the newest held version of this model that is older."""
        older = (
            held
            for held in self._kept
            if held.owner == version.owner and held.number < version.number
        )
        return max(older, key=lambda held: held.number, default=None)

    def _whole(self, version: Version, on_bytes: Callable[[int], None]) -> bytearray:
        num_bytes = frame_bytes(Codec.FP32, num_params(version.shape))
        path = f"/weights/{version.number}"
        frame = self._download(path, num_bytes, version.sha256, on_bytes)
        _check_sha256(version, hashlib.sha256(frame).hexdigest())
        return frame

    def _download(
        self,
        path: str,
        num_bytes: int,
        sha256: str | None,
        on_bytes: Callable[[int], None],
    ) -> bytearray:
        content = bytearray(num_bytes)
        try:
            self._fetch(
                Download(
                    path=path,
                    start=0,
                    total=num_bytes,
                    sha256=sha256,
                    into=memoryview(content),
                    on_bytes=on_bytes,
                )
            )
        except BadDownloadError as error:
            raise BadWeightsError(str(error)) from error
        except RefusedError as error:
            if error.code is ErrorCode.UNKNOWN_VERSION:
                raise BadWeightsError(f"{path}: {error}") from error
            raise
        return content


def _links_bytes(version: Version, held: int) -> int:
    """Return how long the links from `held` are; 0 where the frame is no longer."""
    codec = next((codec for codec in Codec if codec == version.broadcast), None)
    if codec is None:
        return 0
    size = num_params(version.shape)
    num_bytes = (version.number - held) * frame_bytes(codec, size)
    return num_bytes if num_bytes < frame_bytes(Codec.FP32, size) else 0


def _following(
    version: Version, held: int, weights: NDArray[np.float32], links: bytearray
) -> NDArray[np.float32]:
    """Return the version that links make of `weights`, which are used up.

    Raises BadWeightsError when they do not lead to the very bytes of this version.
    """
    layout = layout_hash(version.shape)
    try:
        add_links(links, weights, layout_hash=layout, held=held, version=version.number)
        found = published_sha256(weights, layout_hash=layout, version=version.number)
    except (FrameError, PayloadError) as error:
        raise BadWeightsError(f"links: {error}") from error
    _check_sha256(version, found)
    return weights


def _check_sha256(version: Version, found: str) -> None:
    if found != version.sha256:
        raise BadWeightsError(
            f"version {version.number} must have SHA-256 {version.sha256}, got {found}"
        )


def read_weights(
    frame: bytes | bytearray, shape: ModelShape, *, version: int | None = None
) -> NDArray[np.float32]:
    """Return the flat vector of a published frame: float32, layout order.

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
    return weights
