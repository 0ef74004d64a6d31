"""Typed rows: what the functions of `store` return instead of bare tuples."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import Row

R = TypeVar("R", bound=Struct)


def typed(kind: type[R], row: Row[*tuple[Any, ...]]) -> R:
    """Return a row as a struct; columns that the struct does not name are left out."""
    return msgspec.convert(row, kind, from_attributes=True)


class RunRow(Struct, frozen=True, kw_only=True):
    """A row of `runs`."""

    run_id: str
    state: str
    seed: int
    preset: str
    model_json: str
    layout_hash: str
    tokenizer_hash: str
    corpus_hash: str
    plan_json: str
    token_budget: int | None
    root_version: int
    epoch: int
    tokens_accepted: int
    epoch_tokens_accepted: int
    tasks_done: int
    created_at: float
    stop_at: float | None
    reset_from_version: int | None
    reset_acknowledged: bool
    roll_back_to: int | None
    next_plan_json: str | None
    next_token_budget: int | None


class RangeRow(Struct, frozen=True, kw_only=True):
    """A row of `ranges`."""

    range_id: int
    epoch: int
    shard_id: str
    start_token: int
    num_tokens: int
    attempt: int


class RoundRow(Struct, frozen=True, kw_only=True):
    """A row of `rounds`."""

    round_id: int
    run_id: str
    base_version: int
    state: str
    opened_at: float
    first_claim_at: float | None
    first_submission_at: float | None
    closed_at: float | None
    version: int | None
    round_s: float
    overhead_s: float | None
    shortest_s: float | None


class WorkRow(Struct, frozen=True, kw_only=True):
    """What a submission took, from its row, its claim and its task."""

    tokens: int
    elapsed_s: float
    compute_s: float
    fixed_size: bool


class AppliedRow(Struct, frozen=True, kw_only=True):
    """What one submission brought to its version."""

    base_version: int
    tokens: int
    num_steps: int
    payload_bytes: int


class TaskRow(Struct, frozen=True, kw_only=True):
    """A row of `tasks`."""

    task_id: str
    run_id: str
    kind: str
    epoch: int
    shard_id: str
    start_token: int
    num_tokens: int
    fixed_size: bool
    version: int | None
    state: str
    reason: str | None
    attempt: int
    num_leases: int
    returned_round_id: int | None
    created_at: float
    done_at: float | None
    lease_hash: str | None
    lease_claim_id: str | None
    lease_worker_id: str | None
    lease_terms_json: str | None
    base_version: int | None
    round_id: int | None
    claimed_at: float | None
    expires_at: float | None
    hard_at: float | None
    predicted_s: float | None
    tokens_done: int
    bytes_done: int
    cpu_s: float
    step_s: float
    progress_at: float | None
    paused_s: float
    stalled_at: float | None
    progress_cpu_s: float | None


class ClaimRow(Struct, frozen=True, kw_only=True):
    """A row of `claims`."""

    claim_seq: int
    round_id: int
    worker_id: str
    task_id: str
    num_tokens: int
    claimed_at: float
    predicted_s: float | None
    ended_at: float | None
    outcome: str | None
    tokens_done: int
    progress_at: float | None
    paused_s: float
    fate: str | None


class SubmissionRow(Struct, frozen=True, kw_only=True):
    """A row of `submissions`."""

    submission_id: str
    run_id: str
    task_id: str
    round_id: int
    worker_id: str
    state: str
    reason: str | None
    base_version: int
    version: int | None
    epoch: int
    shard_id: str
    start_token: int
    tokens: int
    num_steps: int
    loss_first: float
    loss_last: float
    loss_mean: float
    claimed_at: float
    accepted_at: float
    compute_s: float
    download_s: float
    download_bytes: int
    upload_s: float | None
    cpu_s: float
    codec: str
    payload_file: str | None
    payload_bytes: int
    body_sha256: str
    answer_json: str
    norm: float | None
    size: float | None
    factor: float | None
    cosine: float | None


class VersionRow(Struct, frozen=True, kw_only=True):
    """A row of `versions`."""

    version: int
    run_id: str
    parent: int | None
    round_id: int | None
    published_sha256: str
    published_bytes: int
    state_sha256: str
    state_bytes: int
    created_at: float
    tokens_total: int
    num_submissions: int
    train_loss: float | None
    plan_json: str
    pruned: bool
    rolled_back_to: int | None
    damaged: bool


class PointRow(Struct, frozen=True, kw_only=True):
    """A version, the round that made it, and what was trained before."""

    version: int
    created_at: float
    tokens_total: int
    num_submissions: int
    train_loss: float | None
    rolled_back_to: int | None
    first_claim_at: float | None
    tokens_before: int | None


class ScoreRow(Struct, frozen=True, kw_only=True):
    """The score of a version, and what it was trained on."""

    version: int
    nats: float
    tokens: int
    bytes: int
    tokens_total: int


class EvaluationRow(Struct, frozen=True, kw_only=True):
    """A row of `evaluations`."""

    submission_id: str
    task_id: str
    run_id: str
    version: int
    worker_id: str
    nats: float
    tokens: int
    bytes: int
    compute_s: float
    created_at: float
    body_sha256: str
    answer_json: str


class HealthRow(Struct, frozen=True, kw_only=True):
    """A row of `ternary_health`."""

    version: int
    before: int | None
    matrices_json: str


class WorkerRow(Struct, frozen=True, kw_only=True):
    """A row of `workers`."""

    worker_id: str
    name: str
    cpu_model: str
    isa: str
    threads: int
    package_version: str
    own_heartbeat_s: float | None
    calibrated_tokens_per_s: float | None
    registered_at: float
    heartbeat_at: float
    phase: str
    draining: bool
    tokens_per_s: float | None
    spread: float | None
    duration_ratio: float | None
    tasks_done: int
    tasks_failed: int
    tokens_accepted: int
    quarantined_at: float | None
    quarantine_reason: str | None
    judged_from: float
    gone_at: float | None
    lease_lost_at: float | None


class EventRow(Struct, frozen=True, kw_only=True):
    """A row of `events`."""

    event_id: int
    at: float
    kind: str
    body_json: str
