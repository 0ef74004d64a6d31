"""Measures what a round took, and opens the next one with the round time that fits.

All functions run inside the caller's transaction.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection

from coordinator.domain import round_time
from coordinator.domain.plan import Aggregation
from coordinator.domain.round_time import Measured, Work
from coordinator.service.fleet import Fleet
from coordinator.service.roster import plan_of, seq_len_of
from coordinator.store import rounds, versions
from coordinator.store.rows import RoundRow, RunRow


def measure_round(
    connection: Connection, fleet: Fleet, run: RunRow, live: RoundRow, now: float
) -> None:
    """Record what a round took that becomes a version `now`.

    Nothing where each submission makes a version: no round is waited for there. Where
    the coordinator stood still since the last claim, its version is made from then on.
    """
    plan = plan_of(run)
    if plan.aggregation is Aggregation.PER_ARRIVAL:
        return
    works = rounds.work_of(connection, live.round_id)
    ended_at = rounds.ended_at(connection, live.round_id) or now
    found = round_time.measured(
        [msgspec.convert(row, Work, from_attributes=True) for row in works],
        merge_s=now - max(ended_at, fleet.awake_since),
        evaluation_s=versions.newest_evaluation_s(connection, run.run_id),
        plan=plan,
        seq_len=seq_len_of(run),
    )
    if found is not None:
        rounds.change_round(
            connection,
            live.round_id,
            overhead_s=found.overhead_s,
            shortest_s=found.shortest_s,
        )


def open_next(
    connection: Connection, run: RunRow, live: RoundRow, *, version: int, now: float
) -> None:
    """Open the round on `version`, after `live` has been closed."""
    rounds.open_round(
        connection,
        run_id=run.run_id,
        base_version=version,
        round_s=next_round_s(connection, run, live),
        now=now,
    )


def next_round_s(connection: Connection, run: RunRow, live: RoundRow) -> float:
    """Return the round time after that of `live`, by the plan in force."""
    return round_time.next_round_s(
        plan_of(run), live.round_s, recently_measured(connection, run)
    )


def recently_measured(connection: Connection, run: RunRow) -> list[Measured]:
    """Return what the newest closed rounds took, oldest first.

    Those of the other kind do not count: their steps and tasks are others.
    """
    # The open one comes on top.
    newest = rounds.newest_rounds(connection, run.run_id, round_time.NUM_ROUNDS + 1)
    of_other_kind = versions.of_other_kind(
        connection,
        run.run_id,
        plan_of(run).round_kind,
        since=newest[0].base_version if newest else 0,
    )
    return [
        Measured(overhead_s=row.overhead_s, shortest_s=row.shortest_s)
        for row in newest
        if row.overhead_s is not None
        and row.shortest_s is not None
        and row.version not in of_other_kind
    ]
