"""All that an expert needs to find what went wrong in a fleet, in one snapshot.

Each record names what it shows of a row. So what opens a door (lease hashes, ids of
claims, keys, passwords, sessions) is never in it, whatever a table has.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import Connection

from coordinator.domain.plan import TrainingPlan
from coordinator.service.fleet import Known
from coordinator.service.looking import look
from coordinator.service.roster import plan_of
from coordinator.service.ternary_health import newest_health
from coordinator.service.view import FleetView, TernaryView, View
from coordinator.store import rounds, runs, tasks, workers
from coordinator.store.rows import RoundRow, RunRow, WorkerRow

R = TypeVar("R", bound=Struct)

#: Of the newest: rounds (with their claims and submissions), events, failed tasks.
NUM_ROUNDS: Final = 20
NUM_EVENTS: Final = 500
NUM_FAILED: Final = 100
#: Of the newest versions: their ternary health.
NUM_EXAMINED: Final = 20


class LeaseRecord(View, frozen=True, kw_only=True):
    """A task that is out, and the clocks of its lease; moments in Unix seconds."""

    task_id: str
    kind: str
    epoch: int
    shard_id: str
    start_token: int
    num_tokens: int
    fixed_size: bool
    attempt: int
    num_leases: int
    lease_worker_id: str | None
    base_version: int | None
    round_id: int | None
    claimed_at: float | None
    predicted_s: float | None
    expires_at: float | None
    hard_at: float | None
    #: What its heartbeats said.
    tokens_done: int
    bytes_done: int
    cpu_s: float
    step_s: float
    progress_at: float | None
    progress_cpu_s: float | None


class FailedRecord(View, frozen=True, kw_only=True):
    """A task that was given up."""

    task_id: str
    kind: str
    epoch: int
    shard_id: str
    start_token: int
    num_tokens: int
    version: int | None
    attempt: int
    num_leases: int
    done_at: float | None
    reason: str | None


class ClaimRecord(View, frozen=True, kw_only=True):
    """Who claimed what in a round, and how it ended; `void`: the round began anew."""

    round_id: int
    worker_id: str
    task_id: str
    num_tokens: int
    claimed_at: float
    predicted_s: float | None
    ended_at: float | None
    outcome: str | None


class SubmissionRecord(View, frozen=True, kw_only=True):
    """A submission: what it took, what it brought, what the guards said."""

    submission_id: str
    task_id: str
    round_id: int
    worker_id: str
    state: str
    reason: str | None
    base_version: int
    version: int | None
    tokens: int
    num_steps: int
    claimed_at: float
    accepted_at: float
    compute_s: float
    download_s: float
    download_bytes: int
    upload_s: float | None
    cpu_s: float
    codec: str
    payload_bytes: int
    loss_first: float
    loss_last: float
    loss_mean: float
    norm: float | None
    size: float | None
    factor: float | None
    cosine: float | None


class EventRecord(View, frozen=True, kw_only=True):
    """Something that happened."""

    event_id: int
    at: float
    kind: str
    body: dict[str, Any]


class Telemetry(View, frozen=True, kw_only=True):
    """What `dump-telemetry` prints."""

    #: The lease clock when this was read; ages are as of then.
    at: float
    #: False: read from the data folder, as it was when a coordinator last ran.
    running: bool
    #: The view of the page: verdicts with their facts, run, round, history.
    fleet: FleetView
    plan: TrainingPlan | None
    #: Who has registered, those that are gone too.
    workers: list[WorkerRow]
    leases: list[LeaseRecord]
    failed: list[FailedRecord]
    rounds: list[RoundRow]
    claims: list[ClaimRecord]
    submissions: list[SubmissionRecord]
    #: Of the last versions that were looked at, newest first.
    ternary: list[TernaryView]
    events: list[EventRecord]


def collect(
    connection: Connection,
    known: Known,
    *,
    now: float,
    loop_lag_ms: float = 0.0,
    insecure_http: bool = False,
) -> Telemetry:
    """Return everything at `now`."""
    run = runs.newest_run(connection)
    recent, claims, submissions = _recent(connection, run)
    return Telemetry(
        at=now,
        running=known.is_running,
        fleet=look(
            connection,
            known,
            now=now,
            loop_lag_ms=loop_lag_ms,
            insecure_http=insecure_http,
            history=True,
        ),
        plan=None if run is None else plan_of(run),
        workers=workers.all_workers(connection),
        leases=[_shown(row, LeaseRecord) for row in tasks.all_leased(connection)],
        failed=_failed(connection, run),
        rounds=recent,
        claims=claims,
        submissions=submissions,
        ternary=[]
        if run is None
        else newest_health(connection, run.run_id, NUM_EXAMINED),
        events=[
            EventRecord(
                event_id=row.event_id,
                at=row.at,
                kind=row.kind,
                body=msgspec.json.decode(row.body_json),
            )
            for row in workers.newest_events(connection, NUM_EVENTS)
        ],
    )


def _recent(
    connection: Connection, run: RunRow | None
) -> tuple[list[RoundRow], list[ClaimRecord], list[SubmissionRecord]]:
    """Return the last rounds of a run, their claims and their submissions."""
    if run is None:
        return [], [], []
    recent = rounds.newest_rounds(connection, run.run_id, NUM_ROUNDS)
    first = recent[0].round_id if recent else 0
    claimed = rounds.claims_since(connection, run.run_id, first)
    sent = rounds.submissions_since(connection, run.run_id, first)
    return (
        recent,
        [_shown(row, ClaimRecord) for row in claimed],
        [_shown(row, SubmissionRecord) for row in sent],
    )


def _failed(connection: Connection, run: RunRow | None) -> list[FailedRecord]:
    if run is None:
        return []
    rows = tasks.latest_failed(connection, run.run_id, NUM_FAILED)
    return [_shown(row, FailedRecord) for row in rows]


def _shown(row: Struct, record: type[R]) -> R:
    return msgspec.convert(row, record, from_attributes=True)
