"""Files that workers download: published frames, links and shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Final

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.fleet import Fleet, Served
from coordinator.service.own_files import look_after
from coordinator.service.shard_check import stamp_of
from coordinator.service.shard_files import UnknownShardError, find_shard
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.rows import VersionRow
from coordinator.store.versions import find_version

BYTES: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Open files, sent as one; `sha256` (hexadecimal) is None where nobody knows it."""

    files: tuple[BinaryIO, ...]
    num_bytes: int
    content_type: str
    sha256: str | None

    def read(self, position: int, num_bytes: int) -> bytes:
        """Return at most so many bytes from there, fewer at the end of a file."""
        for file in self.files:
            size = os.fstat(file.fileno()).st_size
            if position < size:
                return os.pread(file.fileno(), num_bytes, position)
            position -= size
        return b""

    def close(self) -> None:
        """Close all of them."""
        for file in self.files:
            file.close()


async def open_weights(fleet: Fleet, version: int, held: int | None = None) -> Source:
    """Open the published frame of a version, or the links that lead there from `held`.

    Links where all of them are kept and shorter than the frame. Raises RefusedError
    `unknown_version`, also for one whose file is broken and can't be made anew.
    """
    row = await fleet.store.read(lambda connection: find_version(connection, version))
    if row is None or row.pruned:
        raise _unknown(version)
    if held is not None:
        links = await fleet.off_loop(lambda: _open_links(fleet, row, held))
        if links is not None:
            return links
    source = await _open(fleet, version, lambda: _open_frame(fleet, row))
    if source is None:  # broken, or pruned since the row was read
        raise _unknown(version)
    return source


async def open_shard(fleet: Fleet, shard_id: str) -> Source:
    """Open the file of a shard.

    Raises RefusedError `unknown_shard`, also for a shard of the run whose file is not
    the one of the manifest.
    """
    source = await _open(fleet, shard_id, lambda: _open_tokens(fleet, shard_id))
    if source is None:
        raise UnknownShardError(shard_id)
    return source


async def _open(
    fleet: Fleet, served: Served, act: Callable[[], Source | None]
) -> Source | None:
    """Open a file, looked after where it seems broken; None where it stays so.

    What is known to be broken is left to the sweep: hashing it takes long.
    """
    if served in fleet.file_faults:
        return None
    source = await fleet.off_loop(act)
    if source is not None:
        return source
    await look_after(fleet, served)
    return None if served in fleet.file_faults else await fleet.off_loop(act)


def _open_frame(fleet: Fleet, row: VersionRow) -> Source | None:
    """Open a published frame; None when it is gone, or of another length."""
    try:
        file = fleet.blobs.open(BlobKind.PUBLISHED, version_blob(row.version))
    except OSError:
        return None
    if stamp_of(file).num_bytes != row.published_bytes:
        file.close()
        return None
    return Source(
        files=(file,),
        num_bytes=row.published_bytes,
        content_type=BYTES,
        sha256=row.published_sha256,
    )


def _open_links(fleet: Fleet, row: VersionRow, held: int) -> Source | None:
    """Open the links after `held`; None where one is missing, or the frame is shorter.

    The root of a run has no link, so no chain leads from one run to another.
    """
    files: list[BinaryIO] = []
    num_bytes = 0
    for version in range(held + 1, row.version + 1):
        try:
            files.append(fleet.blobs.open(BlobKind.LINK, version_blob(version)))
        except OSError:
            break
        num_bytes += stamp_of(files[-1]).num_bytes
        if num_bytes >= row.published_bytes:
            break
    source = Source(
        files=tuple(files), num_bytes=num_bytes, content_type=BYTES, sha256=None
    )
    if files and len(files) == row.version - held and num_bytes < row.published_bytes:
        return source
    source.close()
    return None


def _open_tokens(fleet: Fleet, shard_id: str) -> Source | None:
    """Open the file of a shard; None for one of the run that is gone or changed."""
    shard = None if fleet.manifest is None else fleet.manifest.shard(shard_id)
    try:
        found = find_shard(fleet.corpus, shard_id)
        file = fleet.fs.open(found.path)
    except (UnknownShardError, OSError):
        if shard is None:
            raise
        return None
    checked, stamp = fleet.shard_stamps.get(shard_id), stamp_of(file)
    is_checked = shard is not None and checked is not None
    if is_checked and checked != stamp:
        file.close()
        return None
    return Source(
        files=(file,),
        num_bytes=stamp.num_bytes,
        content_type=found.content_type,
        sha256=shard.sha256 if shard is not None and is_checked else None,
    )


def _unknown(version: int) -> RefusedError:
    return RefusedError(
        ErrorCode.UNKNOWN_VERSION,
        f"version must be one that is kept, and whole, got {version}",
        field="version",
    )
