"""Files that workers download: published frames and shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Final

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.fleet import Fleet
from coordinator.service.shard_check import Stamp, stamp_of
from coordinator.service.shard_files import find_shard
from coordinator.store.blobs import BlobKind, version_blob
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
    """Open the published frame of a version. Raises RefusedError `unknown_version`."""
    row = await fleet.store.read(lambda connection: find_version(connection, version))
    if row is None or row.pruned:
        raise _unknown(version)

    try:
        file = await fleet.off_loop(
            lambda: fleet.blobs.open(BlobKind.PUBLISHED, version_blob(version))
        )
    except FileNotFoundError as error:  # pruned since the row was read
        raise _unknown(version) from error
    return Source(
        file=file,
        num_bytes=row.published_bytes,
        content_type=BYTES,
        sha256=row.published_sha256,
    )


async def open_shard(fleet: Fleet, shard_id: str) -> Source:
    """Open the file of a shard.

    Raises RefusedError `unknown_shard`, also for a shard of the run whose file is not
    what it was when it was hashed.
    """

    def open_it() -> Source:
        found = find_shard(fleet.corpus, shard_id)
        file = fleet.fs.open(found.path)
        stamp = stamp_of(file)
        try:
            sha256 = _known_hash(fleet, shard_id, stamp)
        except RefusedError:
            file.close()
            raise
        return Source(
            file=file,
            num_bytes=stamp.num_bytes,
            content_type=found.content_type,
            sha256=sha256,
        )

    return await fleet.off_loop(open_it)


def _unknown(version: int) -> RefusedError:
    return RefusedError(
        ErrorCode.UNKNOWN_VERSION,
        f"version must be one that is kept, got {version}",
        field="version",
    )


def _known_hash(fleet: Fleet, shard_id: str, stamp: Stamp) -> str | None:
    """Return the hash of a shard of the run; None of another file of the corpus."""
    checked = fleet.shard_stamps.get(shard_id)
    shard = None if fleet.manifest is None else fleet.manifest.shard(shard_id)
    if shard is None or checked is None:
        return None
    if checked != stamp:
        raise RefusedError(
            ErrorCode.UNKNOWN_SHARD,
            f"shard_id {shard_id} names a file that changed on disk since it was "
            f"hashed: from {checked} to {stamp}; restore it and restart the "
            f"coordinator",
            field="shard_id",
        )
    return shard.sha256
