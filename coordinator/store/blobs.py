"""Big immutable files: published frames, links, server states, payloads.

Order of every write: temporary file, fsync, rename, fsync of the folder, and only
then the database row that names it. A file without a row is a harmless orphan that
the next start removes; a row without its file cannot be mended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final

from bitnet_ext.codecs import Bytes
from coordinator.domain.seams import Fs, NewFile, Rng

_TEMPORARY: Final = ".tmp-"


class BlobKind(StrEnum):
    """What a blob is; also the name of its folder."""

    PUBLISHED = "published"  #: what workers hold
    STATE = "state"  #: fp32 master weights and momentum
    LINK = "link"  #: what leads to a published version from the one before
    PAYLOAD = "payload"  #: the frame of one submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A durable blob."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A durable blob, and the hash of its bytes."""

    name: str
    sha256: str
    num_bytes: int


class Spool:
    """A blob on its way in: named when it is kept."""

    def __init__(self, fs: Fs, path: Path) -> None:
        self._fs = fs
        self._file: NewFile | None = fs.create(path)
        self.path = path
        self.num_bytes = 0

    def write(self, data: Bytes) -> None:
        """Append `data`."""
        if self._file is None:
            raise ValueError("spool is closed")
        self._file.write(data)
        self.num_bytes += len(data)

    def keep(self, target: Path) -> None:
        """Make it durable under the name `target`, in the same folder."""
        if self._file is None:
            raise ValueError("spool is closed")
        self._file.sync()
        self._close()
        self._fs.rename(self.path, target)
        self._fs.sync_folder(target.parent)

    def discard(self) -> None:
        """Throw it away; harmless after `keep`."""
        self._close()
        self._fs.unlink(self.path)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


class Blobs:
    """The folders of blobs below one data folder. Blocking: never on the loop."""

    def __init__(self, folder: Path, fs: Fs, rng: Rng) -> None:
        #: The data folder, which holds a folder of each kind.
        self.folder = folder
        self._fs = fs
        self._rng = rng
        for kind in BlobKind:
            (folder / kind).mkdir(parents=True, exist_ok=True, mode=0o700)

    def spool(self, kind: BlobKind) -> Spool:
        """Open a new blob for writing."""
        return Spool(
            self._fs,
            self.folder / kind / f"{_TEMPORARY}{self._rng.token(8).hex()}",
        )

    def keep(self, spool: Spool, kind: BlobKind, name: str) -> Kept:
        """Make a spool durable under `name`."""
        spool.keep(self.path(kind, name))
        return Kept(name=name, num_bytes=spool.num_bytes)

    def write_frame(self, kind: BlobKind, name: str, parts: Iterable[Bytes]) -> Written:
        """Write a whole frame durably: its `sealed_parts`, then their hash.

        The trailer is the hash so far, and the hash of the file goes on from there:
        its bytes are hashed once.
        """
        spool, digest = self.spool(kind), hashlib.sha256()

        def write(part: Bytes) -> None:
            spool.write(part)
            digest.update(part)

        try:
            for part in parts:
                write(part)
            write(digest.digest())
            kept = self.keep(spool, kind, name)
            return Written(
                name=name, sha256=digest.hexdigest(), num_bytes=kept.num_bytes
            )
        finally:
            spool.discard()

    def path(self, kind: BlobKind, name: str) -> Path:
        """Return where the blob lies."""
        return self.folder / kind / name

    def open(self, kind: BlobKind, name: str) -> BinaryIO:
        """Open a blob; stays readable when it is removed meanwhile."""
        return self._fs.open(self.path(kind, name))

    def read(self, kind: BlobKind, name: str) -> bytes:
        """Return a whole blob. Raises FileNotFoundError."""
        with self.open(kind, name) as file:
            return file.read()

    def remove(self, kind: BlobKind, names: Iterable[str]) -> None:
        """Remove blobs; missing ones are no error."""
        for name in names:
            self._fs.unlink(self.path(kind, name))
        self._fs.sync_folder(self.folder / kind)

    def free_bytes(self) -> int:
        """Return the space left on the disk of the blobs."""
        return self._fs.free_bytes(self.folder)

    def names(self, kind: BlobKind) -> list[str]:
        """Return the names of all blobs of a kind, leftovers included.

        A folder is none: whoever put it there, it was not this program.
        """
        return sorted(
            path.name for path in (self.folder / kind).iterdir() if not path.is_dir()
        )


def version_blob(version: int) -> str:
    """Return the file name of a version, for each of its blobs."""
    return f"v{version:010d}.frame"
