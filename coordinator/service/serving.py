"""Files that workers download: published frames and shards."""

from __future__ import annotations

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
    """An open file; `sha256` (hexadecimal) is None where nobody knows it."""

    file: BinaryIO
    num_bytes: int
    content_type: str
    sha256: str | None


async def open_weights(fleet: Fleet, version: int) -> Source:
    """Open the published frame of a version.

    Raises RefusedError `unknown_version`, also for one whose file is broken and can't
    be made anew.
    """
    row = await fleet.store.read(lambda connection: find_version(connection, version))
    if row is None or row.pruned:
        raise _unknown(version)
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
        file=file,
        num_bytes=row.published_bytes,
        content_type=BYTES,
        sha256=row.published_sha256,
    )


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
        file=file,
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
