"""What the page shows: the bodies of snapshots and events of the live feed.

A snapshot is one `FleetView`. Between snapshots come three kinds of event:

- `fleet.updated`: a `FleetUpdate`; what it names replaces the same field, null
  included; `workers` replaces single rows by `worker_id`
- `version.published`: a `VersionPoint` to append
- `version.evaluated`: an `EvaluationPoint` to add, or to replace by version

Ids and numbers only, never tokens or keys, so that showing them is safe.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from coordinator.domain.plan_change import Change
from coordinator.domain.ternary_health import MatrixHealth
from coordinator.domain.verdicts import WorkerFacts


class View(Struct, frozen=True, kw_only=True):
    """Base of every part."""


class EtaView(View, frozen=True, kw_only=True):
    """When the run will end (`coordinator.domain.eta`); Unix seconds."""

    at: float | None
    earliest_at: float | None
    latest_at: float | None
    reason: str


class TallyView(View, frozen=True, kw_only=True):
    """Tokens trained, by what became of them (`coordinator.domain.accounting`)."""

    trained: int
    #: Handed in; their round is not closed yet.
    accepted: int
    #: Part of a version.
    applied: int
    #: For nothing, by cause; without those that are zero.
    wasted: dict[str, int]


class RollbackView(View, frozen=True, kw_only=True):
    """The run went back to an earlier version, or is about to."""

    #: The version that is `to_version` again, and when it was made (Unix seconds); None
    #: while the round is not closed.
    version: int | None
    at: float | None
    #: The newest scored version before; where none was scored since `to_version`, the
    #: newest. Losses are nats a token, None without a score.
    from_version: int
    from_loss: float | None
    to_version: int
    to_loss: float | None


class RunView(View, frozen=True, kw_only=True):
    """The run, and how far it is."""

    run_id: str
    state: str
    preset: str
    num_params: int
    started_at: float
    stop_at: float | None
    token_budget: int | None
    tokens_accepted: int
    #: One pass over the training shards; `epoch` counts from 1. Its tokens are None
    #: where the corpus is not at hand, which never happens while a coordinator runs.
    epoch: int
    epoch_tokens: int | None
    epoch_tokens_accepted: int
    newest_version: int
    newest_version_at: float
    best_version: int | None
    #: What `gzip -9` needs for the held-out text: the line to get under. None as above.
    gzip_bits_per_byte: float | None
    #: Of the whole fleet, over the last closed rounds; None before the first, once the
    #: run is finished, and where no coordinator runs.
    tokens_per_s: float | None
    eta: EtaView
    #: Of all workers.
    tally: TallyView
    #: Why held-out loss needs a look; None while it falls, or rises little.
    loss_alarm: str | None
    #: None where the run never went back, and once a later version has a lower loss.
    rollback: RollbackView | None
    #: What the plan, or the budget, will be from the next version on.
    plan_changes: list[Change]
    #: Not null after a hard reset that no operator has acknowledged.
    reset_from_version: int | None


class LaneView(View, frozen=True, kw_only=True):
    """One claim of the open round."""

    worker_id: str
    task_id: str
    num_tokens: int
    #: By the last heartbeat; `num_tokens` once it is back.
    tokens_done: int
    claimed_at: float
    predicted_s: float | None
    ended_at: float | None
    #: back, expired, released, failed; None while it is out.
    outcome: str | None


class RoundView(View, frozen=True, kw_only=True):
    """The round that is open."""

    round_id: int
    base_version: int
    #: `open` or `closing` (its step is being computed).
    state: str
    opened_at: float
    first_claim_at: float | None
    #: Seconds that a task of this round should take, and why.
    round_s: float
    round_reason: str
    #: Seconds of a round that go to other things than training, by the last ones; None
    #: before any was measured.
    overhead_s: float | None
    lanes: list[LaneView]


class LastRoundView(View, frozen=True, kw_only=True):
    """The last round that became a version, without what was left out of it."""

    tokens: int
    #: Of all payloads that workers sent.
    payload_bytes: int
    #: Local steps of its middle worker; None in gradient rounds.
    num_steps: int | None


class TrainingView(View, frozen=True, kw_only=True):
    """How the run trains: what its plan says at the tokens accepted by now."""

    #: What workers send (`delta`: weight differences, `gradient`: mean gradients).
    round_kind: str
    #: What makes a version (`rounds`: all that is claimed on the one before,
    #: `per-arrival`: each submission).
    aggregation: str
    #: None in gradient rounds, which have no local steps.
    local_optimiser: str | None
    #: Of the local steps, or of the gradient step: now, and at its peak.
    learning_rate: float
    peak_rate: float
    #: What the rate does (`coordinator.domain.stages`).
    stage: str
    #: Accepted tokens at which that ends; None where it has no end.
    stage_end_tokens: int | None
    #: Accepted tokens at which the second stage begins, or began; None without one.
    second_stage_tokens: int | None
    #: Why the rate stays at its peak after the warm-up; None with a schedule.
    constant_reason: str | None
    #: Now: zero in the second stage.
    weight_decay: float
    #: How submissions are coded, and what workers download of a new version.
    codec: str
    broadcast: str
    #: None before the first.
    last_round: LastRoundView | None


class BooksView(View, frozen=True, kw_only=True):
    """How a worker has done in this run."""

    #: Mean deviation of its recent tasks from `tokens_per_s`, as a share.
    spread: float | None
    #: Actual over predicted time of its last tasks; None before three.
    duration_ratio: float | None
    #: What is wrong with that, in a sentence; None: nothing.
    duration_alarm: str | None
    tally: TallyView


class WorkerView(View, frozen=True, kw_only=True):
    """One worker, and what to think of it."""

    worker_id: str
    name: str
    verdict: str
    #: A sentence or two with the number that decided.
    evidence: str
    #: All that the verdict was drawn from.
    facts: WorkerFacts
    phase: str
    draining: bool
    cpu_model: str
    isa: str
    threads: int
    heartbeat_at: float
    heartbeat_s: float
    #: The task that it holds.
    task_id: str | None
    tokens_done: int | None
    num_tokens: int | None
    claimed_at: float | None
    predicted_s: float | None
    #: Measured by its recent tasks; None before the first.
    tokens_per_s: float | None
    calibrated_tokens_per_s: float | None
    tokens_accepted: int
    tasks_done: int
    tasks_failed: int
    books: BooksView


class FailedTaskView(View, frozen=True, kw_only=True):
    """A task that was given up."""

    task_id: str
    kind: str
    attempt: int
    reason: str


class TasksView(View, frozen=True, kw_only=True):
    """Training tasks of the run by state, and what has not been cut yet."""

    pending: int
    leased: int
    done: int
    failed: int
    #: Leased ones past their prediction: alive, and their workers get on (`slow`).
    soft_expired: int
    #: Leased ones whose workers stand still, or are silent (`stuck`, `lost`).
    stuck: int
    #: Tokens of this epoch that are not yet cut into tasks.
    range_tokens: int
    #: The latest of the failed ones, at most five.
    latest_failed: list[FailedTaskView]


class ServerView(View, frozen=True, kw_only=True):
    """How the coordinator itself is doing."""

    #: Worst delay of the event loop over the last ten seconds.
    loop_lag_ms: float


class VersionPoint(View, frozen=True, kw_only=True):
    """One weight version of the run."""

    version: int
    at: float
    tokens_total: int
    num_submissions: int
    #: Mean cross-entropy of the round's tasks, nats a token; None for the root.
    train_loss: float | None
    #: Tokens of its round by the seconds it took; None for the root.
    tokens_per_s: float | None
    #: The earlier version that it is again; no round led to it, so both are None.
    rolled_back_to: int | None = None


class EvaluationPoint(View, frozen=True, kw_only=True):
    """The score of one version on the held-out text."""

    version: int
    tokens_total: int
    #: Nats a token.
    loss: float
    bits_per_byte: float


class TernaryView(View, frozen=True, kw_only=True):
    """The ternary health of a version, by matrix, in layout order."""

    version: int
    #: The scored version that flips and drift are since; None: there is none.
    before: int | None
    matrices: list[MatrixHealth]


class FleetView(View, frozen=True, kw_only=True):
    """Everything: the body of a snapshot."""

    package_version: str
    #: True where the page is served over plain HTTP beyond loopback.
    insecure_http: bool
    #: What to do before training can begin, or go on; None while it can.
    missing: str | None
    run: RunView | None
    training: TrainingView | None
    round: RoundView | None
    tasks: TasksView | None
    workers: list[WorkerView]
    #: Of the newest version that was looked at; None before the first.
    ternary: TernaryView | None
    server: ServerView
    #: All of the run, oldest first.
    versions: list[VersionPoint]
    evaluations: list[EvaluationPoint]


class FleetUpdate(View, frozen=True, kw_only=True, omit_defaults=True):
    """What changed since the last update: the body of `fleet.updated`."""

    missing: str | UnsetType | None = UNSET
    run: RunView | UnsetType | None = UNSET
    training: TrainingView | UnsetType | None = UNSET
    round: RoundView | UnsetType | None = UNSET
    tasks: TasksView | UnsetType | None = UNSET
    ternary: TernaryView | UnsetType | None = UNSET
    server: ServerView | UnsetType = UNSET
    workers: list[WorkerView] = []
    #: Claims of the round that differ or are new, where nothing else of it has changed.
    lanes: list[LaneView] = []
