"""A result that comes after its lease has ended: still of use, or only a measurement.

Nobody is waiting for it any more, and its task is free again. Where the plan allows it
and nobody else has claimed the task meanwhile, it is taken all the same: into its own
round, or with a lower weight into a later one. Its lease id is still the only right.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from sqlalchemy import Connection

from bitnet_ext.wire.messages import SubmissionMeta
from bitnet_ext.wire.verdicts import ErrorCode, TaskState
from coordinator.domain import leases
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import AcceptLate, Aggregation
from coordinator.domain.staleness import MAX_STALENESS
from coordinator.domain.throughput import waited_s
from coordinator.service.bookkeeping import measure
from coordinator.service.fleet import RUNNING, Fleet
from coordinator.service.returning import expire_overdue, held_task, ring
from coordinator.service.roster import plan_from, plan_of
from coordinator.service.seeding import budget_left
from coordinator.store import rounds, tallies, tasks, versions, workers
from coordinator.store.rows import ClaimRow, RoundRow, RunRow, TaskRow


def leased_task(
    connection: Connection, run: RunRow, meta: SubmissionMeta, now: float
) -> TaskRow:
    """Return the task of a submission, as it is or was leased to its sender.

    Raises RefusedError: unknown_task; lease_lost where the lease has ended and the
    result may not be taken; busy where only the next round may take it.
    """
    try:
        return held_task(connection, meta.task_id, meta.lease_id, now)
    except RefusedError:
        late = _late_task(connection, run, meta)
        if late is None:
            raise
        return late


def _late_task(
    connection: Connection, run: RunRow, meta: SubmissionMeta
) -> TaskRow | None:
    """Return the task of an ended lease as part of the open round; None: too late.

    Raises RefusedError `busy` while the round is closing and the next may take it.
    """
    lease_hash = leases.lease_hash(meta.lease_id)
    claim = rounds.claim_of_lease(connection, lease_hash)
    task = tasks.find_task(connection, meta.task_id)
    live = rounds.live_round(connection, run.run_id)
    if claim is None or task is None or live is None:
        return None
    if run.state != RUNNING:
        return None
    if not _is_untouched(connection, task, claim, lease_hash):
        return None
    began = rounds.find_round(connection, claim.round_id)
    if not _may_join(run, live, began) or not _fits_budget(connection, run, task):
        return None
    if _is_of_an_old_line(connection, run, began):
        return None
    if _is_of_other_kind(connection, run, began):
        return None
    if live.state != "open":
        raise round_closing(live)
    return msgspec.structs.replace(
        task,
        lease_hash=lease_hash,
        lease_worker_id=claim.worker_id,
        base_version=began.base_version,
        round_id=live.round_id,
        claimed_at=claim.claimed_at,
    )


def round_closing(live: RoundRow) -> RefusedError:
    """Return the refusal of what may come again once a round is closed."""
    return RefusedError(
        ErrorCode.BUSY,
        f"round {live.round_id} is being closed, come again for the next",
        retry_after_s=1.0,
    )


def _is_untouched(
    connection: Connection, task: TaskRow, claim: ClaimRow, lease_hash: str
) -> bool:
    """Return whether nobody has claimed the task since this lease."""
    if claim.task_id != task.task_id:
        return False
    if task.state == TaskState.LEASED:  # run out, and not yet noticed
        return task.lease_hash == lease_hash
    newest = rounds.newest_claim_of(connection, task.task_id)
    return task.state == TaskState.PENDING and newest == claim


def _may_join(run: RunRow, live: RoundRow, began: RoundRow) -> bool:
    """Return whether the plan lets a result of round `began` into the live one.

    Where that is closing, into the next, which starts from the version after.
    """
    if began.run_id != run.run_id:
        return False
    is_open, plan = live.state == "open", plan_of(run)
    if plan.aggregation is Aggregation.PER_ARRIVAL:
        # However stale: so is what comes in time.
        return plan.accept_late is not AcceptLate.NEVER
    match plan.accept_late:
        case AcceptLate.NEVER:
            return False
        case AcceptLate.ROUND:
            return began.round_id == live.round_id and is_open
        case AcceptLate.STALE:
            base_version = live.base_version + (0 if is_open else 1)
            return base_version - began.base_version <= MAX_STALENESS


def _is_of_an_old_line(connection: Connection, run: RunRow, began: RoundRow) -> bool:
    """Return whether the run has gone back, or is about to, since a round began."""
    made = versions.rollbacks_of(connection, run.run_id)
    live = rounds.live_round(connection, run.run_id)
    if run.roll_back_to is not None:
        return live is None or began.round_id != live.round_id
    return bool(made) and began.base_version < made[-1].version


def _is_of_other_kind(connection: Connection, run: RunRow, began: RoundRow) -> bool:
    """Return whether the rounds of the run are of another kind by now."""
    made_by = plan_from(connection, run, began.base_version)
    return made_by.round_kind is not plan_of(run).round_kind


def _fits_budget(connection: Connection, run: RunRow, task: TaskRow) -> bool:
    """Return whether the token budget is not given out to others already."""
    left = budget_left(run)
    if left is None or task.state == TaskState.LEASED:
        return True
    return task.num_tokens <= left - tasks.leased_tokens(connection, run.run_id)


@asynccontextmanager
async def booking_late(
    fleet: Fleet, meta: SubmissionMeta, now: float
) -> AsyncIterator[None]:
    """Book a result that is refused inside because its lease has ended."""

    def book(connection: Connection) -> int:
        # A lease that has just run out has not ended in the books yet.
        num_ended = expire_overdue(connection, fleet, now)
        _book_refused(connection, meta, now)
        return num_ended

    try:
        yield
    except RefusedError as refused:
        if refused.code is ErrorCode.LEASE_LOST:
            num_ended = await fleet.store.write(book)
            if num_ended:
                ring(fleet)
        raise


def _book_refused(connection: Connection, meta: SubmissionMeta, now: float) -> None:
    """Count a result that came too late for its worker's speed, and as waste; once."""
    claim = rounds.claim_of_lease(connection, leases.lease_hash(meta.lease_id))
    if claim is None or claim.ended_at is None or claim.outcome == "back":
        return
    if (claim.task_id, claim.worker_id) != (meta.task_id, meta.worker_id):
        return
    run_id = rounds.find_round(connection, claim.round_id).run_id
    tokens = min(meta.tokens, claim.num_tokens)
    rounds.change_claim(
        connection,
        claim.claim_seq,
        tokens_done=tokens,
        progress_at=now,
        paused_s=waited_s(
            elapsed_s=now - claim.claimed_at,
            paused_s=claim.paused_s,
            compute_s=meta.compute_s,
        ),
        lease_hash=None,
    )
    if claim.fate is not None:
        tallies.add_tokens(
            connection,
            run_id=run_id,
            worker_id=claim.worker_id,
            fate=claim.fate,
            tokens=tokens - claim.tokens_done,
        )
    measure(connection, run_id, claim.worker_id)
    workers.add_event(
        connection,
        at=now,
        kind="submission.refused",
        body={
            "task_id": meta.task_id,
            "worker_id": meta.worker_id,
            "reason": "late",
            "fate": claim.fate,
            "tokens": tokens,
            "compute_s": meta.compute_s,
            "download_s": meta.download_s,
            "download_bytes": meta.download_bytes,
        },
    )
