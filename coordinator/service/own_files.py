"""Files that workers are served, and that broke under a running coordinator.

A task must not be given up for what is our own fault: while a file that tasks need is
gone or damaged no work is given out. It is looked at again and again, and work goes on
once it is whole. A published frame is made anew: from the server state of its version,
or from the version before and the link that follows it.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Final

from sqlalchemy import Connection

from bitnet_ext.codecs import PayloadError
from bitnet_ext.frames import FrameError
from coordinator.domain.errors import StartError
from coordinator.domain.leases import backoff_s
from coordinator.service.fleet import FileFault, Fleet, Served
from coordinator.service.shard_check import check_shard
from coordinator.service.version_blobs import remake_published
from coordinator.store import rounds, runs, versions, workers
from coordinator.store.blobs import BlobKind, Blobs, version_blob
from coordinator.store.rows import VersionRow

log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 1 << 20


async def look_after(fleet: Fleet, served: Served) -> bool:
    """Hash a file; mend it where that is possible, else note its fault on the fleet.

    Returns whether it was broken. A version that no round starts from holds nobody
    up: where it can't be mended, that is no fault of the fleet.
    """
    if isinstance(served, int):
        was_broken, reason = await _look_at_version(fleet, served)
    else:
        reason = await fleet.off_loop(lambda: _shard_fault(fleet, served))
        was_broken = reason is not None
    if reason is not None:
        await _note(fleet, served, reason)
    elif fleet.file_faults.pop(served, None) is not None:
        await _tell(fleet, "file.mended", f"{_name(served)} can be served again")
    return was_broken


async def look_again(fleet: Fleet) -> None:
    """Look at what is broken: after 2, 4, 8, ... and then every 60 seconds."""
    now = fleet.clock.now()
    for served, fault in list(fleet.file_faults.items()):
        if fault.look_at <= now:
            fault.num_looks += 1
            fault.look_at = now + backoff_s(fault.num_looks, 1.0)
            await look_after(fleet, served)


async def _note(fleet: Fleet, served: Served, reason: str) -> None:
    """Take a fault down; it is told once."""
    known = fleet.file_faults.get(served)
    if known is not None:
        known.reason = reason
        return
    look_at = fleet.clock.now() + backoff_s(1, 1.0)
    fleet.file_faults[served] = FileFault(reason=reason, look_at=look_at)
    await _tell(fleet, "file.broken", f"no work is given out: {reason}")


async def _tell(fleet: Fleet, kind: str, said: str) -> None:
    log.log(
        logging.ERROR if kind == "file.broken" else logging.INFO,
        said,
        extra={"event": kind},
    )
    now = fleet.clock.now()
    await fleet.store.write(
        lambda connection: workers.add_event(
            connection, at=now, kind=kind, body={"reason": said}
        )
    )
    fleet.work.ring()
    fleet.changed.ring()


def _name(served: Served) -> str:
    return f"version {served}" if isinstance(served, int) else f"shard {served}"


def _shard_fault(fleet: Fleet, shard_id: str) -> str | None:
    """Return what is wrong with a shard of the run; a whole one counts as checked."""
    shard = fleet.the_manifest().shard(shard_id)
    if shard is None:
        return None
    try:
        fleet.shard_stamps[shard_id] = check_shard(fleet.corpus, shard)
    except StartError as error:
        return str(error)
    return None


async def _look_at_version(fleet: Fleet, version: int) -> tuple[bool, str | None]:
    """Return whether it was broken and could be helped, and what is still wrong."""

    def find(connection: Connection) -> tuple[VersionRow | None, bool]:
        run = runs.newest_run(connection)
        live = None if run is None else rounds.live_round(connection, run.run_id)
        is_base = live is not None and live.base_version == version
        return versions.find_version(connection, version), is_base

    row, is_base = await fleet.store.read(find)
    if row is None or row.pruned:
        return False, None
    was_broken, reason = await fleet.off_loop(lambda: _mended(fleet.blobs, row))
    if reason is not None and not is_base:
        return False, None
    return was_broken, reason


def _mended(blobs: Blobs, row: VersionRow) -> tuple[bool, str | None]:
    """Return whether a published frame was broken, and why it still is."""
    name = version_blob(row.version)
    path = blobs.path(BlobKind.PUBLISHED, name)
    if _is_whole(blobs, BlobKind.PUBLISHED, name, row.published_sha256):
        return False, None
    if not _is_whole(blobs, BlobKind.STATE, name, row.state_sha256):
        state = blobs.path(BlobKind.STATE, name)
        return True, (
            f"{path} is missing or damaged, its SHA-256 must be "
            f"{row.published_sha256}, and so is {state}: restore them from a backup"
        )
    try:
        remake_published(blobs, row)
    except (OSError, FrameError, PayloadError) as error:
        return True, f"{path} is missing or damaged, and can't be made anew: {error}"
    log.warning(
        "%s was missing or damaged and is made anew",
        path,
        extra={"event": "file.made"},
    )
    return True, None


def _is_whole(blobs: Blobs, kind: BlobKind, name: str, sha256: str) -> bool:
    try:
        with blobs.open(kind, name) as file:
            digest = hashlib.sha256()
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
            return digest.hexdigest() == sha256
    except OSError:
        return False
