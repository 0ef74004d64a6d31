"""What outlives the process of a worker: flat vectors, as frames in a folder.

A frame is written beside its place and renamed, and its checksum is read back with it:
a file is whole, or it is thrown away. There is no fsync. A process that is killed loses
nothing that it wrote; a machine that loses power may, and what is torn is seen.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.codecs import Codec, PayloadError, decode, fp32_payload
from bitnet_ext.frames import (
    FrameError,
    FrameHeader,
    FrameKind,
    check_header,
    decode_frame,
    frame_parts,
)

log = logging.getLogger(__name__)

_ENDING: Final = ".frame"
_UNFINISHED: Final = ".part"


@dataclass(frozen=True, slots=True)
class Kept:
    """A vector, float32 (n,), and the weight version that it belongs to."""

    vector: NDArray[np.float32]
    version: int = 0


@dataclass(frozen=True, slots=True)
class Owner:
    """The run and the model that vectors belong to."""

    run_id: str
    layout_hash: bytes


class Shelf:
    """Vectors of one worker: of the latest run, one of each kind.

    Without a folder everything is forgotten. A disk that fails never stops the work:
    it is told in the log, and what could not be written is not there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def put(self, owner: Owner, kind: FrameKind, kept: Kept | None) -> None:
        """Keep this in place of the last of its kind, and nothing of other runs.

        None, and what is not finite, only removes the last.
        """
        if self._folder is None:
            return
        place = self._place(self._folder, owner, kind)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clear(self._folder, owner)
            if kept is None:
                place.unlink(missing_ok=True)
            else:
                _write(place, owner, kind, kept)
        except (OSError, PayloadError) as error:
            # What it should have replaced is out of date.
            _throw_away(place, error)

    def get(self, owner: Owner, kind: FrameKind, num_elements: int) -> Kept | None:
        """Return what is kept of that kind; None where there is none of this owner.

        What is damaged, of another model or of another length is thrown away.
        """
        if self._folder is None:
            return None
        place = self._place(self._folder, owner, kind)
        try:
            header, payload = decode_frame(place.read_bytes())
            check_header(
                header,
                kind=kind,
                layout_hash=owner.layout_hash,
                num_elements=num_elements,
            )
            return Kept(decode(header.codec, payload, num_elements), header.version)
        except FileNotFoundError:
            return None
        except (OSError, FrameError, PayloadError) as error:
            _throw_away(place, error)
            return None

    @staticmethod
    def _place(folder: Path, owner: Owner, kind: FrameKind) -> Path:
        return folder / f"{owner.run_id}.{kind}{_ENDING}"

    @staticmethod
    def _clear(folder: Path, owner: Owner) -> None:
        """Remove what earlier runs and broken-off writes have left."""
        for name in os.listdir(folder):
            of_another = not name.startswith(f"{owner.run_id}.")
            if name.endswith(_UNFINISHED) or (of_another and name.endswith(_ENDING)):
                (folder / name).unlink(missing_ok=True)


def _write(place: Path, owner: Owner, kind: FrameKind, kept: Kept) -> None:
    header = FrameHeader(
        kind=kind,
        codec=Codec.FP32,
        layout_hash=owner.layout_hash,
        version=kept.version,
        num_elements=kept.vector.size,
    )
    part = place.with_suffix(_UNFINISHED)
    with part.open("wb") as file:
        file.writelines(frame_parts(header, fp32_payload(kept.vector)))
    part.replace(place)


def _throw_away(place: Path, reason: Exception) -> None:
    log.warning(
        "%s is of no use and is thrown away: %s",
        place,
        reason,
        extra={"event": "shelf.fault"},
    )
    try:
        place.unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "%s can't be removed: %s", place, error, extra={"event": "shelf.fault"}
        )
