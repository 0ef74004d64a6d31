"""What a lease that has ended tells: how fast its worker is, what became of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection

from bitnet_ext.wire.verdicts import TaskKind
from coordinator.domain import throughput
from coordinator.domain.accounting import Fate
from coordinator.domain.throughput import Trained
from coordinator.store import rounds, tallies, tasks, workers
from coordinator.store.rows import ClaimRow, SubmissionRow, TaskRow, WorkerRow

#: A lease that ended so is no right to the task any more.
_RIGHT_ENDED: Final = (Fate.RELEASED, Fate.FAILED, Fate.KICKED)


def book_end(
    connection: Connection, task: TaskRow, *, outcome: str, fate: Fate, now: float
) -> None:
    """End the claim of a training task, as leased: `tokens_done` by `progress_at`.

    `paused_s` of that the worker waited for a coordinator that stood still.
    Where only a part was handed in, the task is that part by now. Tokens count for
    their fate, and for the speed of the worker. What a claim that has ended before
    came to is taken back: its result was late, and counts all the same.
    """
    claim = rounds.claim_of_lease(connection, task.lease_hash or "")
    if claim is None:
        return
    share = task.num_tokens / claim.num_tokens
    rounds.change_claim(
        connection,
        claim.claim_seq,
        num_tokens=task.num_tokens,
        predicted_s=None if claim.predicted_s is None else share * claim.predicted_s,
        ended_at=now,
        outcome=outcome,
        fate=fate,
        tokens_done=task.tokens_done,
        progress_at=task.progress_at,
        paused_s=task.paused_s,
        # Given back, or taken away: no late result of it counts.
        lease_hash=None if fate in _RIGHT_ENDED else task.lease_hash,
    )
    if claim.fate is not None:
        _add(connection, task.run_id, claim.worker_id, claim.fate, -claim.tokens_done)
    _add(connection, task.run_id, claim.worker_id, fate, task.tokens_done)
    measure(connection, task.run_id, claim.worker_id)


def _add(
    connection: Connection, run_id: str, worker_id: str, fate: str, tokens: int
) -> None:
    tallies.add_tokens(
        connection, run_id=run_id, worker_id=worker_id, fate=fate, tokens=tokens
    )


def book_merge(
    connection: Connection, rows: Iterable[SubmissionRow], fate: Fate
) -> None:
    """Count what accepted submissions came to once their round is closed."""
    for row in rows:
        _add(connection, row.run_id, row.worker_id, Fate.ACCEPTED, -row.tokens)
        _add(connection, row.run_id, row.worker_id, fate, row.tokens)


def book_reset(connection: Connection, run_id: str) -> None:
    """Count all that is out or waits for its round, before a hard reset ends them."""
    for task in tasks.all_leased(connection, run_id):
        if task.kind == TaskKind.TRAIN:
            worker_id = task.lease_worker_id or ""
            _add(connection, run_id, worker_id, Fate.RESET, task.tokens_done)
    live = rounds.live_round(connection, run_id)
    if live is not None:
        waiting = rounds.accepted_in_round(connection, live.round_id)
        book_merge(connection, waiting, Fate.FILTERED)


def measure(connection: Connection, run_id: str, worker_id: str) -> None:
    """Bring the measured speed of a worker up to date."""
    recent = recent_work(connection, run_id, worker_id)
    found = throughput.measured(recent)
    if found is not None:
        workers.change_worker(
            connection,
            worker_id,
            tokens_per_s=found.tokens_per_s,
            spread=found.spread,
            duration_ratio=throughput.duration_ratio(recent),
        )


def recent_work(connection: Connection, run_id: str, worker_id: str) -> list[Trained]:
    """Return what the last leases of a worker came to in a run, newest first.

    Time in which the coordinator stood still counts for nothing.
    """
    claims = rounds.recent_claims(
        connection, run_id, worker_id, newest=throughput.NUM_RECENT
    )
    return [_trained(claim) for claim in claims if _tells_speed(claim)]


def _trained(claim: ClaimRow) -> Trained:
    return Trained(
        tokens=claim.tokens_done,
        seconds=_worked_s(claim),
        num_tokens=claim.num_tokens,
        predicted_s=claim.predicted_s,
    )


def _tells_speed(claim: ClaimRow) -> bool:
    """Return whether it is known well enough how long the work of a claim took.

    Of a lease that was lost nobody knows what of its tokens was trained in a pause.
    """
    return claim.outcome == "back" or _worked_s(claim) >= claim.paused_s


def _worked_s(claim: ClaimRow) -> float:
    until = claim.progress_at or claim.claimed_at
    return until - claim.claimed_at - claim.paused_s


def duration_alarm(
    connection: Connection, run_id: str, worker: WorkerRow
) -> str | None:
    """Return what is wrong with the predictions for a worker; None: nothing."""
    ratio = worker.duration_ratio
    if ratio is None or not throughput.is_alarming(ratio):
        return None
    recent = recent_work(connection, run_id, worker.worker_id)
    return throughput.ratio_alarm(ratio, recent)
