"""Stretches that the corpus does not have are given up, so that they block no claim.

No command makes such; a database that came from elsewhere may hold some.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from coordinator.domain.manifest import Manifest
from coordinator.service.seeding import add_epoch_if_done
from coordinator.store import runs, tasks, workers
from coordinator.store.rows import RangeRow, RunRow, TaskRow

log = logging.getLogger(__name__)

P = TypeVar("P", TaskRow, RangeRow)


def next_in_corpus(
    connection: Connection,
    run: RunRow,
    manifest: Manifest,
    find: Callable[[], P | None],
    now: float,
) -> P | None:
    """Return the next pending task or range that is a stretch of the corpus.

    `find` returns the next one of all; what is none is given up on the way.
    """
    while (piece := find()) is not None:
        shard = manifest.shard(piece.shard_id)
        end = 0 if shard is None else shard.num_tokens
        if piece.start_token + piece.num_tokens <= end:
            return piece
        _give_up(connection, run, piece.shard_id, end, now)
        add_epoch_if_done(connection, run, manifest, now)
    return None


def _give_up(
    connection: Connection, run: RunRow, shard_id: str, end: int, now: float
) -> None:
    """Give up all that waits in a shard beyond its `end` (0: there is no such shard).

    All at once: an epoch may have 100,000 tasks, and a worker waits for the answer.
    """
    reason = f"shard {shard_id} of the corpus has {end} tokens, the stretch ends beyond"
    num_tasks = tasks.fail_beyond(
        connection, run.run_id, shard_id=shard_id, end=end, reason=reason, now=now
    )
    num_ranges = runs.drop_beyond(connection, run.run_id, shard_id=shard_id, end=end)
    log.error(
        "given up %d tasks and %d ranges: %s",
        num_tasks,
        num_ranges,
        reason,
        extra={
            "event": "stretches.dropped",
            "run_id": run.run_id,
            "shard_id": shard_id,
        },
    )
    body = {"shard_id": shard_id, "tasks": num_tasks, "ranges": num_ranges}
    workers.add_event(connection, at=now, kind="stretches.dropped", body=body)
