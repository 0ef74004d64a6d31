"""What there is to train: one epoch of ranges, or of tasks of a fixed size.

All functions run inside the caller's transaction.
"""

from __future__ import annotations

import logging

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import TaskKind
from coordinator.domain.manifest import Manifest
from coordinator.domain.seams import Rng
from coordinator.service.roster import seq_len_of
from coordinator.store import runs, tasks, workers
from coordinator.store.rows import RunRow

log = logging.getLogger(__name__)


def task_id(rng: Rng) -> str:
    """Return a fresh id for a task."""
    return f"t-{rng.token(6).hex()}"


def add_epoch(connection: Connection, run: RunRow, manifest: Manifest) -> int:
    """Add one epoch of ranges, to be cut into tasks when they are claimed.

    Returns its tokens. Tokens at the very end of the last shard are trained like
    all others; only the last one of a shard has no target there.
    """
    epoch = _next_epoch(connection, run)
    for shard in manifest.train_shards():
        runs.add_range(
            connection,
            run_id=run.run_id,
            epoch=epoch,
            shard_id=shard.shard_id,
            start_token=0,
            num_tokens=shard.num_tokens,
        )
    return sum(shard.num_tokens for shard in manifest.train_shards())


def add_fixed_tasks(
    connection: Connection,
    run: RunRow,
    manifest: Manifest,
    *,
    tokens: int,
    now: float,
    rng: Rng,
) -> int:
    """Add one epoch of pending tasks of `tokens` each; return how many.

    In whole sequences, rounded up. The last task of a shard takes what is left, however
    little.
    """
    epoch, count, seq_len = _next_epoch(connection, run), 0, seq_len_of(run)
    size = -(-tokens // seq_len) * seq_len
    for shard in manifest.train_shards():
        for start in range(0, shard.num_tokens, size):
            tasks.add_task(
                connection,
                task_id=task_id(rng),
                run_id=run.run_id,
                kind=TaskKind.TRAIN,
                epoch=epoch,
                shard_id=shard.shard_id,
                start_token=start,
                num_tokens=min(size, shard.num_tokens - start),
                fixed_size=True,
                # Claimed in this order, whatever their ids.
                created_at=now + 1e-6 * count,
            )
            count += 1
    return count


def add_epoch_if_done(
    connection: Connection, run: RunRow, manifest: Manifest, now: float
) -> bool:
    """Begin the next epoch where this one has nothing left and budget remains.

    Tasks that were given up do not hold it up; they stay reported as failed. Where
    all of them were, the next would fare no better: it has to be seeded by hand.
    """
    if not _has_ended(connection, run):
        return False
    if is_stalled(connection, run):
        log.error(
            "no task of epoch %d was accepted: training stops until "
            "seed-real-tasks adds another",
            run.epoch,
            extra={"event": "epoch.failed", "run_id": run.run_id, "epoch": run.epoch},
        )
        body = {"run_id": run.run_id, "epoch": run.epoch}
        workers.add_event(connection, at=now, kind="epoch.failed", body=body)
        return False
    add_epoch(connection, run, manifest)
    return True


def is_stalled(connection: Connection, run: RunRow) -> bool:
    """Return whether an epoch has ended of which nothing was accepted."""
    if not _has_ended(connection, run):
        return False
    # Anew: a guard of the round that is being closed may just have taken some back.
    return not runs.find_run(connection, run.run_id).epoch_tokens_accepted


def _has_ended(connection: Connection, run: RunRow) -> bool:
    """Return whether there was an epoch, nothing of it is left, and budget is."""
    if run.epoch == 0 or budget_left(run) == 0:
        return False
    if runs.range_tokens(connection, run.run_id):
        return False
    return not tasks.count_unfinished(connection, run.run_id, TaskKind.TRAIN)


def budget_left(run: RunRow) -> int | None:
    """Return the tokens still to be accepted; None without a budget."""
    if run.token_budget is None:
        return None
    return max(0, run.token_budget - run.tokens_accepted)


def is_over(run: RunRow, now: float) -> bool:
    """Return whether no new training is given out: by budget, or by time."""
    return budget_left(run) == 0 or (run.stop_at is not None and run.stop_at <= now)


def add_evaluation(
    connection: Connection,
    run: RunRow,
    manifest: Manifest,
    *,
    version: int,
    now: float,
    rng: Rng,
) -> None:
    """Add the task that scores a version on the held-out shard."""
    shard = manifest.held_out_shard()
    tasks.add_task(
        connection,
        task_id=task_id(rng),
        run_id=run.run_id,
        kind=TaskKind.EVALUATE,
        epoch=0,
        shard_id=shard.shard_id,
        start_token=0,
        num_tokens=shard.num_tokens,
        fixed_size=True,
        version=version,
        created_at=now,
    )


def _next_epoch(connection: Connection, run: RunRow) -> int:
    epoch = run.epoch + 1
    runs.change_run(connection, run.run_id, epoch=epoch, epoch_tokens_accepted=0)
    return epoch
