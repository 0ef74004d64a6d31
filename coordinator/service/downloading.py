"""An exported folder in one file, for the browser of an operator.

One at a time: it keeps a core busy for seconds, with a large model.
"""

from __future__ import annotations

import errno
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from bitnet_ext.exports.provenance import (
    ExportError,
    Format,
    UnwritableError,
    Variant,
)
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.service.exporting import Chosen, Pick, choose, export_version
from coordinator.service.fleet import Fleet
from coordinator.service.serving import Source

TAR: Final = "application/x-tar"
#: What a process that was killed may have left; the next export removes it.
_SCRATCH: Final = ".export-"


async def open_archive(
    fleet: Fleet, wish: int | Pick, variant: tuple[Format, Variant]
) -> tuple[str, Source]:
    """Return the name and the file of an archive that holds one exported folder.

    The file has no name on disk: it is gone once it is closed. Raises RefusedError:
    no_run, unknown_version, busy, disk_low, and bad_request where the version can't be
    exported so.
    """
    if fleet.exporting.locked():
        raise RefusedError(
            ErrorCode.BUSY, "another export is being written", retry_after_s=10.0
        )
    async with fleet.exporting:
        chosen = await fleet.store.read(lambda connection: choose(connection, wish))
        name = "-".join(
            ("bitnet", chosen.run.preset, f"v{chosen.version.version}", *variant)
        )
        return name, await fleet.off_loop(lambda: _pack(fleet, chosen, variant, name))


def _pack(
    fleet: Fleet, chosen: Chosen, variant: tuple[Format, Variant], name: str
) -> Source:
    data = fleet.blobs.folder
    for left in data.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=data) as scratch:
            folder = Path(scratch) / name
            export_version(data, fleet.corpus, chosen, variant, folder)
            return _archive(folder, data)
    except UnwritableError as error:
        if not error.full:
            raise
        raise RefusedError(
            ErrorCode.DISK_LOW, f"the data folder has no room for it: {error.__cause__}"
        ) from error
    except ExportError as error:
        raise RefusedError(ErrorCode.BAD_REQUEST, str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RefusedError(
            ErrorCode.DISK_LOW, f"the data folder has no room for it: {error.strerror}"
        ) from error


def _archive(folder: Path, data: Path) -> Source:
    """Return the folder as an open file; the same folder gives the same bytes."""
    file = tempfile.TemporaryFile(dir=data)  # noqa: SIM115 - whoever sends it closes it
    with tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, f"{folder.name}/{path.name}", filter=_plain)
    file.flush()  # it is read by its descriptor
    num_bytes = file.tell()
    return Source(files=(file,), num_bytes=num_bytes, content_type=TAR, sha256=None)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
