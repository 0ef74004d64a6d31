"""Retention: versions that are not kept lose both blobs, and payloads follow."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator.domain.retention import versions_to_prune
from coordinator.domain.rollback import best_of
from coordinator.service.fleet import Fleet
from coordinator.service.lines import line_of, whole_of
from coordinator.service.version_blobs import remove_version
from coordinator.store import health, rounds, runs, tasks, versions
from coordinator.store.blobs import BlobKind
from coordinator.store.rows import RunRow


@dataclass(frozen=True, slots=True)
class _Pruned:
    versions: list[int]
    payloads: list[str]


async def prune_versions(fleet: Fleet) -> list[int]:
    """Let go of what retention does not keep; return the versions.

    Rows first, files after: a crash in between leaves files without a row, which
    the next start removes.
    """
    pruned = await fleet.store.write(
        lambda connection: _mark(connection, fleet.keep_versions)
    )

    def remove() -> None:
        for version in pruned.versions:
            remove_version(fleet.blobs, version)
        if pruned.payloads:
            fleet.blobs.remove(BlobKind.PAYLOAD, pruned.payloads)

    await fleet.off_loop(remove)
    return pruned.versions


def _mark(connection: Connection, keep_last: int) -> _Pruned:
    run = runs.newest_run(connection)
    if run is None:
        return _Pruned([], [])
    # Those of an earlier run stay: a hard reset keeps what was there.
    kept = [
        row.version
        for row in versions.kept_versions(connection)
        if row.run_id == run.run_id
    ]
    newest = versions.newest_version(connection, run.run_id).version
    gone = versions_to_prune(
        kept, newest=newest, pinned=_pinned(connection, run), keep_last=keep_last
    )
    if not gone:
        return _Pruned([], [])
    versions.mark_pruned(connection, gone)
    # Only the unbroken line of newest versions can be made again from payloads.
    payloads = rounds.forget_payloads(connection, newest - keep_last)
    return _Pruned(gone, payloads)


def _pinned(connection: Connection, run: RunRow) -> set[int]:
    """Return the versions that somebody still needs."""
    leased = {task.base_version for task in tasks.all_leased(connection)}
    waiting = tasks.evaluations_open(connection, run.run_id)
    best = versions.best_version(connection, run.run_id)
    # What the run may go back to, or is about to.
    whole = whole_of(connection, run.run_id)
    line = line_of(connection, run.run_id)
    open_to = {version: loss for version, loss in line.items() if version in whole}
    to = best_of(open_to) if open_to else None
    # The next scored version is compared with it.
    examined = health.newest_examined(connection, run.run_id)
    wanted = {*leased, *waiting, best, to, run.roll_back_to, examined}
    return {version for version in wanted if version is not None}
