"""Rounds, the claims made in them, and the submissions that came back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import Connection, bindparam, func, insert, select, update

from bitnet_ext.wire.verdicts import SubmissionState
from coordinator.store.rows import (
    AppliedRow,
    ClaimRow,
    RoundRow,
    SubmissionRow,
    WorkRow,
    typed,
)
from coordinator.store.tables import claims, rounds, submissions, tasks

#: Made once, as they are asked for with each claim, or each second.
_LIVE: Final = select(rounds).where(
    rounds.c.run_id == bindparam("of_run"), rounds.c.state != "closed"
)
_OF_WORKER: Final = (
    select(claims.c.claim_seq)
    .where(
        claims.c.round_id == bindparam("of_round"),
        claims.c.worker_id == bindparam("of_worker"),
        claims.c.outcome.is_(None) | (claims.c.outcome != "void"),
    )
    .limit(1)
)
_RECENT_CLAIMS: Final = (
    select(claims)
    .join(rounds, rounds.c.round_id == claims.c.round_id)
    .where(
        claims.c.worker_id == bindparam("of_worker"),
        rounds.c.run_id == bindparam("of_run"),
        claims.c.ended_at.is_not(None),
        claims.c.tokens_done > 0,
    )
    .order_by(claims.c.claim_seq.desc())
    .limit(bindparam("most"))
)
_RECENT_SECONDS: Final = (
    select(
        submissions.c.tokens,
        submissions.c.compute_s,
        submissions.c.accepted_at - submissions.c.claimed_at,
    )
    .where(
        submissions.c.worker_id == bindparam("of_worker"),
        submissions.c.run_id == bindparam("of_run"),
    )
    .order_by(submissions.c.accepted_at.desc(), submissions.c.submission_id)
    .limit(bindparam("most"))
)
_ADD_CLAIM: Final = insert(claims)
_ROUND: Final = select(rounds).where(rounds.c.round_id == bindparam("of_round"))
_CHANGE_ROUND: Final = update(rounds).where(rounds.c.round_id == bindparam("of_round"))
_OF_LEASE: Final = select(claims).where(claims.c.lease_hash == bindparam("of_lease"))
_CHANGE_CLAIM: Final = update(claims).where(claims.c.claim_seq == bindparam("of_claim"))
_SUBMISSION: Final = select(submissions).where(
    submissions.c.submission_id == bindparam("of_submission")
)


def open_round(
    connection: Connection,
    *,
    run_id: str,
    base_version: int,
    round_s: float,
    now: float,
) -> None:
    """Open the next round on a version."""
    connection.execute(
        insert(rounds).values(
            run_id=run_id,
            base_version=base_version,
            round_s=round_s,
            state="open",
            opened_at=now,
        )
    )


def live_round(connection: Connection, run_id: str) -> RoundRow | None:
    """Return the round of a run that is open or closing."""
    row = connection.execute(_LIVE, {"of_run": run_id}).first()
    return None if row is None else typed(RoundRow, row)


def find_round(connection: Connection, round_id: int) -> RoundRow:
    """Return a round that has claims."""
    row = connection.execute(_ROUND, {"of_round": round_id}).one()
    return typed(RoundRow, row)


def change_round(connection: Connection, round_id: int, **columns: Any) -> None:
    """Set columns of a round."""
    connection.execute(_CHANGE_ROUND, {"of_round": round_id, **columns})


def note_first_submission(connection: Connection, round_id: int, now: float) -> None:
    """Record when the first submission of a round came; later ones change nothing."""
    connection.execute(
        update(rounds)
        .where(rounds.c.round_id == round_id, rounds.c.first_submission_at.is_(None))
        .values(first_submission_at=now)
    )


def add_claim(connection: Connection, **columns: Any) -> None:
    """Record that a worker claimed a task in a round."""
    connection.execute(_ADD_CLAIM, columns)


def claim_of_lease(connection: Connection, lease_hash: str) -> ClaimRow | None:
    """Return the claim that a lease was given out for, while that may still count."""
    row = connection.execute(_OF_LEASE, {"of_lease": lease_hash}).first()
    return None if row is None else typed(ClaimRow, row)


def claims_of_leases(
    connection: Connection, lease_hashes: Collection[str]
) -> list[ClaimRow]:
    """Return the claims that leases were given out for, in order."""
    rows = connection.execute(
        select(claims)
        .where(claims.c.lease_hash.in_(lease_hashes))
        .order_by(claims.c.claim_seq)
    )
    return [typed(ClaimRow, row) for row in rows]


def newest_claim_of(connection: Connection, task_id: str) -> ClaimRow | None:
    """Return the last claim of a task."""
    row = connection.execute(
        select(claims)
        .where(claims.c.task_id == task_id)
        .order_by(claims.c.claim_seq.desc())
        .limit(1)
    ).first()
    return None if row is None else typed(ClaimRow, row)


def change_claim(connection: Connection, claim_seq: int, **columns: Any) -> None:
    """Set columns of a claim."""
    connection.execute(_CHANGE_CLAIM, {"of_claim": claim_seq, **columns})


def void_claims(connection: Connection, round_id: int) -> None:
    """Start a round over: claims that have ended keep nobody from claiming again."""
    connection.execute(
        update(claims)
        .where(claims.c.round_id == round_id, claims.c.ended_at.is_not(None))
        .values(outcome="void")
    )


def forget_leases(connection: Connection, round_id: int) -> None:
    """Let no late result of the claims of a round count that have ended so far."""
    connection.execute(
        update(claims)
        .where(claims.c.round_id == round_id, claims.c.ended_at.is_not(None))
        .values(lease_hash=None)
    )


def claims_of(connection: Connection, round_id: int) -> list[ClaimRow]:
    """Return the claims of a round that still count, in order."""
    rows = connection.execute(
        select(claims)
        .where(
            claims.c.round_id == round_id,
            claims.c.outcome.is_(None) | (claims.c.outcome != "void"),
        )
        .order_by(claims.c.claim_seq)
    )
    return [typed(ClaimRow, row) for row in rows]


def has_claim(connection: Connection, round_id: int, worker_id: str) -> bool:
    """Return whether a worker has a claim in a round that still counts."""
    row = connection.execute(_OF_WORKER, {"of_round": round_id, "of_worker": worker_id})
    return row.first() is not None


def recent_claims(
    connection: Connection, run_id: str, worker_id: str, *, newest: int
) -> list[ClaimRow]:
    """Return the last claims in which a worker trained something, newest first.

    Those that have ended, of one run.
    """
    of = {"of_run": run_id, "of_worker": worker_id, "most": newest}
    rows = connection.execute(_RECENT_CLAIMS, of)
    return [typed(ClaimRow, row) for row in rows]


def work_of(connection: Connection, round_id: int) -> list[WorkRow]:
    """Return what the submissions of a round took that were claimed in it, in no order.

    Without the time in which their workers waited for a coordinator that stood still.
    """
    took_s = submissions.c.accepted_at - submissions.c.claimed_at
    rows = connection.execute(
        select(
            submissions.c.tokens,
            (took_s - claims.c.paused_s).label("elapsed_s"),
            submissions.c.compute_s,
            tasks.c.fixed_size,
        )
        .join(tasks, tasks.c.task_id == submissions.c.task_id)
        .join(
            claims,
            (claims.c.task_id == submissions.c.task_id)
            & (claims.c.round_id == submissions.c.round_id)
            & (claims.c.outcome == "back"),
        )
        .where(submissions.c.round_id == round_id)
    )
    return [typed(WorkRow, row) for row in rows]


def ended_at(connection: Connection, round_id: int) -> float | None:
    """Return when the last claim of a round ended; None without any."""
    found: float | None = connection.execute(
        select(func.max(claims.c.ended_at)).where(claims.c.round_id == round_id)
    ).scalar_one()
    return found


def newest_rounds(connection: Connection, run_id: str, limit: int) -> list[RoundRow]:
    """Return the last rounds of a run, oldest first."""
    rows = connection.execute(
        select(rounds)
        .where(rounds.c.run_id == run_id)
        .order_by(rounds.c.round_id.desc())
        .limit(limit)
    )
    return [typed(RoundRow, row) for row in reversed(rows.all())]


def claims_since(connection: Connection, run_id: str, round_id: int) -> list[ClaimRow]:
    """Return all claims of a run from a round on, void ones too, in order."""
    rows = connection.execute(
        select(claims)
        .join(rounds, rounds.c.round_id == claims.c.round_id)
        .where(rounds.c.run_id == run_id, claims.c.round_id >= round_id)
        .order_by(claims.c.claim_seq)
    )
    return [typed(ClaimRow, row) for row in rows]


def submissions_since(
    connection: Connection, run_id: str, round_id: int
) -> list[SubmissionRow]:
    """Return all submissions to a run from a round on, in order of arrival."""
    rows = connection.execute(
        select(submissions)
        .where(submissions.c.run_id == run_id, submissions.c.round_id >= round_id)
        .order_by(submissions.c.accepted_at, submissions.c.submission_id)
    )
    return [typed(SubmissionRow, row) for row in rows]


def add_submission(connection: Connection, **columns: Any) -> None:
    """Insert an accepted submission."""
    connection.execute(
        insert(submissions).values(state=SubmissionState.ACCEPTED, **columns)
    )


def find_submission(connection: Connection, submission_id: str) -> SubmissionRow | None:
    """Return a submission by its id."""
    row = connection.execute(_SUBMISSION, {"of_submission": submission_id}).first()
    return None if row is None else typed(SubmissionRow, row)


def accepted_in_round(connection: Connection, round_id: int) -> list[SubmissionRow]:
    """Return what a round will merge, in the one order in which it is merged."""
    rows = connection.execute(
        select(submissions)
        .where(
            submissions.c.round_id == round_id,
            submissions.c.state == SubmissionState.ACCEPTED,
        )
        .order_by(
            submissions.c.epoch, submissions.c.shard_id, submissions.c.start_token
        )
    )
    return [typed(SubmissionRow, row) for row in rows]


def tokens_within(
    connection: Connection, *, epoch: int, shard_id: str, start: int, end: int
) -> dict[str, int]:
    """Return the tokens of a stretch that are accepted, by worker."""
    rows = connection.execute(
        select(submissions.c.worker_id, func.sum(submissions.c.tokens))
        .where(
            submissions.c.epoch == epoch,
            submissions.c.shard_id == shard_id,
            submissions.c.start_token >= start,
            submissions.c.start_token < end,
            submissions.c.state != SubmissionState.FILTERED,
        )
        .group_by(submissions.c.worker_id)
    )
    return {worker_id: int(tokens) for worker_id, tokens in rows}


def apply_submissions(connection: Connection, round_id: int, version: int) -> None:
    """Mark every accepted submission of a round as part of `version`."""
    connection.execute(
        update(submissions)
        .where(
            submissions.c.round_id == round_id,
            submissions.c.state == SubmissionState.ACCEPTED,
        )
        .values(state=SubmissionState.APPLIED, version=version)
    )


def applied_last(connection: Connection, run_id: str) -> list[AppliedRow]:
    """Return what the last version was made of that is no rollback, in no order."""
    newest = select(func.max(submissions.c.version)).where(
        submissions.c.run_id == run_id
    )
    rows = connection.execute(
        select(
            submissions.c.tokens,
            submissions.c.num_steps,
            submissions.c.payload_bytes,
            submissions.c.base_version,
        ).where(
            submissions.c.run_id == run_id,
            submissions.c.version == newest.scalar_subquery(),
        )
    )
    return [typed(AppliedRow, row) for row in rows]


def filter_submissions(connection: Connection, round_id: int, reason: str) -> None:
    """Leave every accepted submission of a round out, with the reason."""
    connection.execute(
        update(submissions)
        .where(
            submissions.c.round_id == round_id,
            submissions.c.state == SubmissionState.ACCEPTED,
        )
        .values(state=SubmissionState.FILTERED, reason=reason)
    )


def filter_one(connection: Connection, submission_id: str, reason: str) -> None:
    """Leave one submission out, with the reason."""
    connection.execute(
        update(submissions)
        .where(
            submissions.c.submission_id == submission_id,
            submissions.c.state == SubmissionState.ACCEPTED,
        )
        .values(state=SubmissionState.FILTERED, reason=reason)
    )


def rule(connection: Connection, submission_id: str, **columns: Any) -> None:
    """Record what the guards found out about a submission."""
    connection.execute(
        update(submissions)
        .where(submissions.c.submission_id == submission_id)
        .values(**columns)
    )


def recent_sizes(
    connection: Connection, run_id: str, *, after: int, newest: int
) -> list[float]:
    """Return the sizes of the submissions that were applied last, in no order.

    Only those of versions after `after` count.
    """
    rows = connection.execute(
        select(submissions.c.size)
        .where(
            submissions.c.run_id == run_id,
            submissions.c.state == SubmissionState.APPLIED,
            submissions.c.size.is_not(None),
            submissions.c.version > after,
        )
        .order_by(
            submissions.c.version.desc(),
            submissions.c.epoch,
            submissions.c.shard_id,
            submissions.c.start_token,
        )
        .limit(newest)
    )
    return [size for (size,) in rows]


def recent_seconds(
    connection: Connection, run_id: str, worker_id: str, *, newest: int
) -> list[tuple[int, float, float]]:
    """Return (tokens, seconds of computing, seconds from claim to acceptance).

    One for each of the newest submissions of a worker in a run, newest first.
    """
    of = {"of_run": run_id, "of_worker": worker_id, "most": newest}
    rows = connection.execute(_RECENT_SECONDS, of)
    return [(tokens, compute_s, total_s) for tokens, compute_s, total_s in rows]


def left_out_of(
    connection: Connection, worker_id: str, *, since: float, newest: int
) -> list[bool]:
    """Return whether each of a worker's last rulings left it out, newest first.

    Only submissions accepted after `since` count.
    """
    rows = connection.execute(
        select(submissions.c.state)
        .where(
            submissions.c.worker_id == worker_id,
            submissions.c.accepted_at > since,
            submissions.c.size.is_not(None),
        )
        .order_by(submissions.c.accepted_at.desc(), submissions.c.submission_id)
        .limit(newest)
    )
    return [state == SubmissionState.FILTERED for (state,) in rows]


def filter_run(connection: Connection, run_id: str, reason: str) -> None:
    """Leave out everything of a run that is accepted but not applied."""
    connection.execute(
        update(submissions)
        .where(
            submissions.c.run_id == run_id,
            submissions.c.state == SubmissionState.ACCEPTED,
        )
        .values(state=SubmissionState.FILTERED, reason=reason)
    )


def close_rounds(connection: Connection, run_id: str, now: float) -> None:
    """Close whatever round of a run is still live, without a version."""
    connection.execute(
        update(rounds)
        .where(rounds.c.run_id == run_id, rounds.c.state != "closed")
        .values(state="closed", closed_at=now)
    )


def payload_files(connection: Connection) -> set[str]:
    """Return the names of all payloads that a row still needs."""
    rows = connection.execute(
        select(submissions.c.payload_file).where(
            submissions.c.payload_file.is_not(None)
        )
    )
    return {name for (name,) in rows}


def forget_payloads(connection: Connection, up_to_version: int) -> list[str]:
    """Let go of payloads that only lead to pruned versions; return their names."""
    # A late one was merged into a version that is not the next after its base.
    before = func.coalesce(submissions.c.version - 1, submissions.c.base_version)
    gone = (
        submissions.c.payload_file.is_not(None),
        submissions.c.state != SubmissionState.ACCEPTED,
        before < up_to_version,
    )
    names = [
        name
        for (name,) in connection.execute(
            select(submissions.c.payload_file).where(*gone)
        )
    ]
    connection.execute(update(submissions).where(*gone).values(payload_file=None))
    return names


def applied_tokens_by_worker(connection: Connection, run_id: str) -> dict[str, int]:
    """Return the tokens of each worker that are part of a version."""
    rows = connection.execute(
        select(submissions.c.worker_id, func.sum(submissions.c.tokens))
        .where(
            submissions.c.run_id == run_id,
            submissions.c.state == SubmissionState.APPLIED,
        )
        .group_by(submissions.c.worker_id)
    )
    return {worker_id: int(tokens) for worker_id, tokens in rows}
