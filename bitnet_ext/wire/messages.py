"""JSON bodies of the worker API. Unknown fields and values out of range are refused.

Times are Unix seconds UTC (`_at`) or durations in seconds (`_s`); a worker is
only ever given durations, so that its own clock decides nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from bitnet_ext.wire.verdicts import (
    ErrorCode,
    FailCode,
    LeaseState,
    Optimiser,
    RoundKind,
    SubmissionState,
    TaskKind,
    WorkerPhase,
)

# `\Z`, because `$` would let a line break through at the end.
ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"

#: Heartbeats may be so far apart: a lease outlives six of them, whoever holds it.
MAX_HEARTBEAT_S: Final = 60.0

#: What workers download of each version where it is not a chain of links: all of it.
EXACT: Final = "exact"

Id = Annotated[str, Meta(pattern=ID_PATTERN)]
LeaseId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(max_length=64, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Text = Annotated[str, Meta(max_length=2000)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Positive = Annotated[int, Meta(ge=1, le=2**62)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Rate = Annotated[float, Meta(gt=0.0, le=1e12)]
Loss = Annotated[float, Meta(ge=0.0, le=1e6)]


class Message(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Base of every body: immutable, by keyword, strict; defaults are not sent."""


class ErrorBody(Message, frozen=True, kw_only=True):
    """Every answer that is not a success."""

    code: ErrorCode
    message: str
    #: The field of the request that is wrong, where one is.
    field: str | None = None


class RegisterRequest(Message, frozen=True, kw_only=True):
    """`POST /register`. Sent once at boot, once more after calibration."""

    protocol_version: int
    worker_id: Id
    name: Name
    #: `BITNET_MODEL_PRESET` where it is set; must then equal the coordinator's.
    preset: Name | None = None
    package_version: Name
    cpu_model: Text
    #: Which kernel variant runs, e.g. `avx512vnni`.
    isa: Name
    threads: Annotated[int, Meta(ge=1, le=4096)]
    #: `BITNET_HEARTBEAT_SECONDS` where it is set; wins for this worker.
    heartbeat_s: Annotated[float, Meta(gt=0.0, le=MAX_HEARTBEAT_S)] | None = None
    #: Tokens per second of real forward + backward steps; a prior, never a deadline.
    calibrated_tokens_per_s: Rate | None = None
    target_task_tokens: Positive | None = None


class RegisterAnswer(Message, frozen=True, kw_only=True):
    """What a worker needs before its first claim."""

    protocol_version: int
    worker_id: Id
    run_id: Id
    preset: str
    #: Fields of `bitnet_ext.layout.ModelShape`.
    model: dict[str, Any]
    layout_hash: Sha256
    tokenizer_hash: Sha256
    corpus_hash: Sha256
    heartbeat_s: float
    #: Sequences in one local step and what makes it, for calibration; None makes none,
    #: where workers send mean gradients.
    batch_size: int
    optimiser: Optimiser | None = None


class ClaimRequest(Message, frozen=True, kw_only=True):
    """`POST /work`. The same `claim_id` always gets the same lease."""

    #: The coordinator may be another since this worker registered.
    protocol_version: int
    worker_id: Id
    claim_id: Id


class HyperParameters(Message, frozen=True, kw_only=True):
    """The local steps of one task; the schedule lives on the coordinator alone.

    A mean gradient takes `clip_norm` only, and is sent nothing else.
    """

    optimiser: Optimiser = Optimiser.MUON
    #: Of Muon: the share of its momentum that the next step keeps.
    momentum: float = 0.0
    #: Learning rate of the first local step; the last has `lr_end`, linear between.
    lr_start: float = 0.0
    lr_end: float = 0.0
    #: Decoupled weight decay, on matrices and embeddings, not on norms.
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    #: Largest global L2 norm of a gradient.
    clip_norm: float


class Task(Message, frozen=True, kw_only=True):
    """The answer to a claim: one task, held for `lease_s` unless renewed."""

    task_id: Id
    kind: TaskKind
    lease_id: LeaseId
    lease_s: float
    run_id: Id
    #: The weights to start from (train) or to score (evaluate).
    base_version: int
    #: SHA-256 of the whole published frame of `base_version`.
    base_sha256: Sha256
    shard_id: Id
    #: SHA-256 of the whole shard file.
    shard_sha256: Sha256
    #: Stretch of the order in which the shard is trained (of its text, to evaluate),
    #: in bytes; 4 bytes a token, little-endian int32. A trained token is an *input*
    #: position; its target is the token after it in the text.
    byte_offset: Count
    byte_length: Positive
    #: Size of the whole shard file in bytes.
    shard_bytes: Positive
    #: True where the manifest says that the text was generated.
    synthetic: bool = False
    #: End-of-text token: starts each document.
    eot_id: int
    #: What to hand in (training only).
    round_kind: RoundKind = RoundKind.DELTA
    #: Local steps (or parts of the mean gradient) and sequences in each; the last
    #: may hold fewer.
    num_steps: Count
    batch_size: Positive
    seq_len: Positive
    #: Sequences in a block of the shard, within which they are shuffled by `seed` (a
    #: function of run seed, epoch and shard); 0 to evaluate: the order is the text's.
    block_size: Count = 0
    seed: Count
    #: Seconds after the claim at which to hand in what is trained by then, unless the
    #: rest takes less than a quarter of them; None to evaluate.
    stop_after_s: Seconds | None = None
    #: How to encode the pseudo-gradient: a codec name of `bitnet_ext.codecs`.
    codec: str
    hyper: HyperParameters
    #: UTF-8 bytes behind the tokens of the stretch (evaluate only, else 0).
    text_bytes: Count = 0
    #: Codec of the links that lead to `base_version`, or EXACT where there are none.
    broadcast: str = EXACT


class HeartbeatRequest(Message, frozen=True, kw_only=True):
    """`POST /heartbeat`: alive, and how far."""

    worker_id: Id
    phase: WorkerPhase
    task_id: Id | None = None
    lease_id: LeaseId | None = None
    #: Tokens trained or scored of this task so far.
    tokens_done: Count = 0
    #: Bytes downloaded and uploaded for this task so far.
    bytes_done: Count = 0
    #: CPU seconds of the process since it started.
    cpu_s: Seconds = 0.0
    #: Wall seconds of the latest local step, 0 before the first.
    step_s: Seconds = 0.0


class HeartbeatAnswer(Message, frozen=True, kw_only=True):
    """How long the lease lasts from the moment the request was *sent*."""

    lease: LeaseState
    lease_s: float
    heartbeat_s: float
    #: Hand in or give back what you hold, then ask for no more.
    drain: bool = False


class SubmissionMeta(Message, frozen=True, kw_only=True):
    """The JSON block in front of the frame of `POST /gradient`."""

    submission_id: Id
    task_id: Id
    lease_id: LeaseId
    worker_id: Id
    base_version: int
    #: Steps and tokens really trained: all of the task, or whole steps from its start.
    num_steps: Positive
    tokens: Positive
    #: Mean cross-entropy (nats a token) of the first and the last local step,
    #: and over the whole task.
    loss_first: Loss
    loss_last: Loss
    loss_mean: Loss
    compute_s: Seconds
    download_s: Seconds
    download_bytes: Count
    cpu_s: Seconds


class SubmissionAnswer(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Stored with the submission: the same id always gets the same answer.

    What was stored by protocol 3 had more fields.
    """

    state: SubmissionState
    round_id: int


class EvaluationRequest(Message, frozen=True, kw_only=True):
    """`POST /tasks/{task_id}/evaluation`: the score of one version."""

    worker_id: Id
    lease_id: LeaseId
    submission_id: Id
    version: Positive
    #: Summed cross-entropy in nats over `tokens` tokens.
    nats: Annotated[float, Meta(ge=0.0, le=1e15)]
    tokens: Positive
    #: UTF-8 bytes of the scored text: must equal the task's `text_bytes`.
    bytes: Positive
    compute_s: Seconds


class EvaluationAnswer(Message, frozen=True, kw_only=True):
    """Stored with the evaluation."""

    submission_id: Id
    task_id: Id
    version: int


class ReleaseRequest(Message, frozen=True, kw_only=True):
    """`POST /tasks/{task_id}/release`: give a task back, untrained."""

    worker_id: Id
    lease_id: LeaseId
    reason: Text = ""


class FailRequest(Message, frozen=True, kw_only=True):
    """`POST /tasks/{task_id}/fail`: say why it cannot be done."""

    worker_id: Id
    lease_id: LeaseId
    code: FailCode
    message: Text


class TaskAnswer(Message, frozen=True, kw_only=True):
    """The state of a task after `release` or `fail`."""

    task_id: Id
    state: str


class LogRecord(Message, frozen=True, kw_only=True):
    """One line of a worker's log."""

    at: Annotated[float, Meta(ge=0.0, le=1e11)]
    level: Annotated[str, Meta(pattern=r"^(debug|info|warning|error|critical)\Z")]
    event: Annotated[str, Meta(max_length=100)] = ""
    message: Annotated[str, Meta(max_length=8000)]
    task_id: Id | None = None


class LogsRequest(Message, frozen=True, kw_only=True):
    """`POST /logs`: a batch of log records."""

    worker_id: Id
    records: Annotated[list[LogRecord], Meta(max_length=200)]
