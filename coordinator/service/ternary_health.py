"""Ternary health of every scored version, on the workbench, once its score is there.

The coordinator has both versions that are compared on its disk, so no worker has to
download a second one for it. It holds nobody up: what a crash leaves out is made up
for at the next start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from bitnet_ext.codecs import PayloadError
from bitnet_ext.frames import FrameError
from bitnet_ext.layout import shape_from_json
from coordinator.domain.ternary_health import MatrixHealth, examine
from coordinator.service.fleet import Fleet
from coordinator.service.version_blobs import read_published
from coordinator.service.view import TernaryView
from coordinator.store import health, runs
from coordinator.store.blobs import Blobs
from coordinator.store.rows import HealthRow, RunRow

log = logging.getLogger(__name__)

#: How often scores are looked for, in seconds: nobody waits for what is made of them.
HEALTH_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Due:
    """A scored version that nobody has looked at, and what it is compared with."""

    run: RunRow
    version: int
    before: int | None


async def examine_due(fleet: Fleet) -> int:
    """Look at all scored versions that are due, oldest first; return how many.

    All: one at a time would fall behind where scores come faster, and a version that
    is pruned meanwhile is never looked at.
    """
    count = 0
    while await _examine_next(fleet):
        count += 1
    return count


async def _examine_next(fleet: Fleet) -> bool:
    """Look at the oldest scored version that is due; return False when none is."""
    due = await fleet.store.read(_find)
    if due is None:
        return False
    found = await fleet.off_loop(lambda: _examine(fleet.blobs, due))
    await fleet.store.write(lambda connection: _keep(connection, due, found))
    fleet.changed.ring()
    return True


def _find(connection: Connection) -> _Due | None:
    run = runs.newest_run(connection)
    version = None if run is None else health.next_to_examine(connection, run.run_id)
    if run is None or version is None:
        return None
    return _Due(run, version, health.scored_before(connection, run.run_id, version))


def _examine(blobs: Blobs, due: _Due) -> list[MatrixHealth]:
    """Return what there is to say of a version; nothing where its frame is broken."""
    shape = shape_from_json(msgspec.json.decode(due.run.model_json))
    weights = _read(blobs, due.version)
    if weights is None:
        return []
    before = None if due.before is None else _read(blobs, due.before)
    return examine(shape, weights, before)


def _read(blobs: Blobs, version: int) -> NDArray[np.float32] | None:
    try:
        return read_published(blobs, version)
    except (OSError, FrameError, PayloadError) as error:
        log.warning(
            "the ternary health of version %d is not known: %s",
            version,
            error,
            extra={"event": "health.unknown", "version": version},
        )
        return None


def _keep(connection: Connection, due: _Due, found: list[MatrixHealth]) -> None:
    is_compared = any(matrix.flips is not None for matrix in found)
    health.add_health(
        connection,
        version=due.version,
        run_id=due.run.run_id,
        before=due.before if is_compared else None,
        matrices_json=msgspec.json.encode(found).decode(),
    )


def newest_health(connection: Connection, run_id: str, limit: int) -> list[TernaryView]:
    """Return the health of the last versions that have one, newest first."""
    return [_view(row) for row in health.newest_health(connection, run_id, limit)]


def _view(row: HealthRow) -> TernaryView:
    return TernaryView(
        version=row.version,
        before=row.before,
        matrices=msgspec.json.decode(row.matrices_json, type=list[MatrixHealth]),
    )
