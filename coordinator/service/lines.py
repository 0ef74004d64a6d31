"""The newest line of a run: its losses, its rollbacks, and the decision to go back.

A decision is one number in the row of the run; `rolling_back` makes the version.
"""

from __future__ import annotations

import logging

import msgspec
from sqlalchemy import Connection

from coordinator.domain.rollback import (
    RollBack,
    Rollback,
    deciding_losses,
    loss_alarm,
    newest_line,
    rollback_due,
)
from coordinator.service.fleet import RUNNING, Fleet
from coordinator.service.seeding import is_over
from coordinator.service.view import RollbackView
from coordinator.store import runs, versions, workers
from coordinator.store.rows import RunRow, VersionRow

log = logging.getLogger(__name__)


def roll_back_if_due(
    connection: Connection, fleet: Fleet, run: RunRow, now: float
) -> None:
    """Decide to go back where loss has risen, the operator allows it and it helps.

    To be called with each score. A run that trains no more keeps what it has.
    """
    if fleet.roll_back is RollBack.NEVER or run.roll_back_to is not None:
        return
    if run.state != RUNNING or is_over(run, now):
        return
    rollbacks = rollbacks_of(connection, run.run_id)
    line = deciding_losses(
        line_of(connection, run.run_id), whole_of(connection, run.run_id)
    )
    to = rollback_due(line, rollbacks)
    if to is not None:
        decide(connection, run, to, loss_alarm(line, rollbacks) or "", now)


def whole_of(connection: Connection, run_id: str) -> set[int]:
    """Return the versions that a run can go back to: kept, and not found damaged.

    Who has been told that one is damaged is not told again with each score.
    """
    return {
        row.version
        for row in versions.kept_versions(connection)
        if row.run_id == run_id and not row.damaged
    }


def rollbacks_of(connection: Connection, run_id: str) -> list[Rollback]:
    """Return the rollbacks of a run, in order."""
    return [
        Rollback(version=row.version, to=row.rolled_back_to)
        for row in versions.rollbacks_of(connection, run_id)
        if row.rolled_back_to is not None
    ]


def line_of(connection: Connection, run_id: str) -> dict[int, float]:
    """Return held-out loss by version, nats a token, of the newest line of a run."""
    return newest_line(_losses(connection, run_id), rollbacks_of(connection, run_id))


def _losses(connection: Connection, run_id: str) -> dict[int, float]:
    return {
        score.version: score.nats / score.tokens
        for score in versions.scores_of(connection, run_id)
    }


def rollback_view(connection: Connection, run: RunRow) -> RollbackView | None:
    """Return the rollback that is due or was made last; None once it has helped."""
    if run.roll_back_to is not None:
        return describe(connection, run, run.roll_back_to, None)
    made = versions.rollbacks_of(connection, run.run_id)
    if not made or made[-1].rolled_back_to is None:
        return None
    view = describe(connection, run, made[-1].rolled_back_to, made[-1])
    line = line_of(connection, run.run_id)
    since = [loss for version, loss in line.items() if version > made[-1].version]
    has_helped = since and (view.to_loss is None or min(since) < view.to_loss)
    return None if has_helped else view


def decide(
    connection: Connection, run: RunRow, to: int, reason: str, now: float
) -> None:
    """Let a run go back to a version once its round is closed; the last word counts."""
    runs.change_run(connection, run.run_id, roll_back_to=to)
    log.warning(
        "the run goes back to version %d once its round is closed: %s",
        to,
        reason,
        extra={"event": "rollback.decided", "version": to},
    )
    about = msgspec.to_builtins(describe(connection, run, to, None))
    body = {**about, "reason": reason}
    workers.add_event(connection, at=now, kind="rollback.decided", body=body)


def describe(
    connection: Connection, run: RunRow, to: int, made: VersionRow | None
) -> RollbackView:
    """Return a rollback to `to`: the one that `made` it, or one to come."""
    losses = _losses(connection, run.run_id)
    last = made.parent if made else None
    if last is None:
        last = versions.newest_version(connection, run.run_id).version
    left = max((n for n in losses if to < n <= last), default=last)
    return RollbackView(
        version=None if made is None else made.version,
        at=None if made is None else made.created_at,
        from_version=left,
        from_loss=losses.get(left),
        to_version=to,
        to_loss=losses.get(to),
    )
