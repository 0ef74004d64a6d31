"""Runs and ranges: what is trained, and which stretches are left of this epoch."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, bindparam, case, func, insert, select, update

from coordinator.store.rows import RangeRow, RunRow, typed
from coordinator.store.tables import ranges, runs

# Of what is asked for each second, or with each claim, the statement is made once: that
# takes longer than to run it.
_NEWEST: Final = select(runs).order_by(
    runs.c.created_at.desc(), runs.c.root_version.desc()
)
_NEXT_RANGE: Final = (
    select(ranges)
    .where(ranges.c.run_id == bindparam("of_run"))
    .order_by(ranges.c.epoch, ranges.c.range_id)
    .limit(1)
)


def add_run(connection: Connection, **columns: Any) -> None:
    """Insert a run."""
    connection.execute(insert(runs).values(**columns))


def newest_run(connection: Connection) -> RunRow | None:
    """Return the run that was made last, whatever its state."""
    row = connection.execute(_NEWEST).first()
    return None if row is None else typed(RunRow, row)


def find_run(connection: Connection, run_id: str) -> RunRow:
    """Return a run by its id, which some row names, so there is one."""
    row = connection.execute(select(runs).where(runs.c.run_id == run_id)).one()
    return typed(RunRow, row)


def change_run(connection: Connection, run_id: str, **columns: Any) -> None:
    """Set columns of a run."""
    connection.execute(update(runs).where(runs.c.run_id == run_id).values(**columns))


def add_accepted_tokens(
    connection: Connection, run_id: str, *, epoch: int, tokens: int, tasks: int = 0
) -> None:
    """Count tokens that were just accepted (negative: given back by a filter).

    They are of `epoch`; `tasks` were done with them.
    """
    of_epoch = case((runs.c.epoch == epoch, tokens), else_=0)
    connection.execute(
        update(runs)
        .where(runs.c.run_id == run_id)
        .values(
            tokens_accepted=runs.c.tokens_accepted + tokens,
            epoch_tokens_accepted=runs.c.epoch_tokens_accepted + of_epoch,
            tasks_done=runs.c.tasks_done + tasks,
        )
    )


def add_range(connection: Connection, **columns: Any) -> None:
    """Insert a stretch to be trained; it has used up no attempt, unless said."""
    connection.execute(insert(ranges).values(**columns))


def next_range(connection: Connection, run_id: str) -> RangeRow | None:
    """Return the range to cut from next: oldest epoch, then oldest range."""
    row = connection.execute(_NEXT_RANGE, {"of_run": run_id}).first()
    return None if row is None else typed(RangeRow, row)


def shorten_range(connection: Connection, piece: RangeRow, taken: int) -> None:
    """Take `taken` tokens from the front of a range; remove it when none is left."""
    this = ranges.c.range_id == piece.range_id
    if taken == piece.num_tokens:
        connection.execute(ranges.delete().where(this))
        return
    connection.execute(
        update(ranges)
        .where(this)
        .values(
            start_token=piece.start_token + taken,
            num_tokens=piece.num_tokens - taken,
        )
    )


def range_tokens(connection: Connection, run_id: str) -> int:
    """Return the tokens of all ranges of a run."""
    return int(
        connection.execute(
            select(func.coalesce(func.sum(ranges.c.num_tokens), 0)).where(
                ranges.c.run_id == run_id
            )
        ).scalar_one()
    )


def drop_beyond(connection: Connection, run_id: str, *, shard_id: str, end: int) -> int:
    """Forget ranges of a shard that go beyond `end`; return how many."""
    done = connection.execute(
        ranges.delete().where(
            ranges.c.run_id == run_id,
            ranges.c.shard_id == shard_id,
            ranges.c.start_token + ranges.c.num_tokens > end,
        )
    )
    return done.rowcount


def drop_ranges(connection: Connection, run_id: str) -> None:
    """Forget what was left of a run that has ended."""
    connection.execute(ranges.delete().where(ranges.c.run_id == run_id))
