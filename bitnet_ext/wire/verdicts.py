"""The words of the fleet: one enum for each set, stored and sent in lower case."""

from __future__ import annotations

from enum import StrEnum


class TaskState(StrEnum):
    """Where a task stands."""

    PENDING = "pending"  #: waiting for a worker to claim it
    LEASED = "leased"  #: a worker holds it until `expires_at`
    DONE = "done"  #: its submission (or evaluation) was accepted
    FAILED = "failed"  #: given up after the last attempt, with a reason


class TaskKind(StrEnum):
    """What a task asks for."""

    TRAIN = "train"  #: local steps, or a mean gradient, on a stretch of a shard
    EVALUATE = "evaluate"  #: score one version on the held-out shard


class RoundKind(StrEnum):
    """What the tasks of a run hand in, and so how its rounds become versions."""

    DELTA = "delta"  #: base minus trained after local steps; the outer step follows
    GRADIENT = "gradient"  #: the mean gradient; a step of Muon and AdamW follows


class Optimiser(StrEnum):
    """What makes a local step."""

    ADAMW = "adamw"  #: on all numbers
    MUON = "muon"  #: on hidden matrices; AdamW on the rest


class WorkerPhase(StrEnum):
    """What a worker says it does right now."""

    STARTING = "starting"  #: registered, not yet asking for work
    CALIBRATING = "calibrating"  #: timing real steps at boot
    IDLE = "idle"  #: asked for work, got none
    DOWNLOADING = "downloading"  #: fetching weights or tokens
    TRAINING = "training"  #: local steps
    EVALUATING = "evaluating"  #: scoring a version
    UPLOADING = "uploading"  #: encoding and sending a submission
    STOPPING = "stopping"  #: told to stop, gives back what it holds


class Verdict(StrEnum):
    """What the coordinator makes of a worker, from numbers it measured itself."""

    COMPUTING = "computing"  #: holds a task and its heartbeats arrive
    SLOW = "slow"  #: advances, past its prediction
    STUCK = "stuck"  #: its heartbeats arrive, but show no progress
    DRAINING = "draining"  #: gets no more tasks, as an operator asked
    WAITING = "waiting"  #: its work of this round is back, the round is open
    IDLE = "idle"  #: nothing to claim
    LOST = "lost"  #: no heartbeat within the limit
    QUARANTINED = "quarantined"  #: gets no work: its submissions were left out
    GONE = "gone"  #: put away by an operator, and not counted


class LeaseState(StrEnum):
    """The answer of a heartbeat about the lease that it named."""

    NONE = "none"  #: the heartbeat named no lease
    HELD = "held"  #: the lease lives on
    LOST = "lost"  #: stop: the task belongs to nobody or to somebody else


class SubmissionState(StrEnum):
    """What became of a submission."""

    ACCEPTED = "accepted"  #: payload durable and row committed
    APPLIED = "applied"  #: part of a version
    FILTERED = "filtered"  #: left out, with a reason; its tokens return to a range


class ErrorCode(StrEnum):
    """Why a request was refused. The coordinator maps each to one HTTP status."""

    UNAUTHORIZED = "unauthorized"  #: 401, no or wrong key
    BAD_REQUEST = "bad_request"  #: 400, a field is missing or out of range
    PROTOCOL_MISMATCH = "protocol_mismatch"  #: 400, names both versions
    PRESET_MISMATCH = "preset_mismatch"  #: 409, names both presets
    UNKNOWN_PRESET = "unknown_preset"  #: 400
    UNKNOWN_WORKER = "unknown_worker"  #: 404, register first
    UNKNOWN_TASK = "unknown_task"  #: 404
    UNKNOWN_SHARD = "unknown_shard"  #: 404
    UNKNOWN_VERSION = "unknown_version"  #: 404, never written or not kept
    NOT_FOUND = "not_found"  #: 404, no such route
    METHOD_NOT_ALLOWED = "method_not_allowed"  #: 405
    LEASE_LOST = "lease_lost"  #: 409, expired, given back, or another's
    STALE_BASE = "stale_base"  #: 409, base version is not the one leased
    WRONG_LENGTH = "wrong_length"  #: 400, body or vector of another length
    NON_FINITE = "non_finite"  #: 400, NaN or infinity in a gradient or a loss
    BAD_FRAME = "bad_frame"  #: 400, magic, version, kind, codec or checksum
    LAYOUT_MISMATCH = "layout_mismatch"  #: 409, another model
    SUBMISSION_CONFLICT = "submission_conflict"  #: 422, same id, other body
    UNSUPPORTED_MEDIA = "unsupported_media"  #: 415
    TOO_LARGE = "too_large"  #: 413
    BAD_RANGE = "bad_range"  #: 416
    RATE_LIMITED = "rate_limited"  #: 429
    BUSY = "busy"  #: 503, try again after Retry-After
    NO_RUN = "no_run"  #: 503, no corpus yet
    DISK_LOW = "disk_low"  #: 503
    INTERNAL = "internal"  #: 500, a bug; the log has the story


class FailCode(StrEnum):
    """Why a worker cannot do a task (`POST /tasks/{task_id}/fail`)."""

    SYNTHETIC_SHARD = "synthetic_shard"  #: not allowed on this worker
    BAD_SHARD = "bad_shard"  #: wrong length, hash or token ids
    BAD_WEIGHTS = "bad_weights"  #: the version fails its checks
    NON_FINITE_LOSS = "non_finite_loss"  #: training diverged
    OUT_OF_MEMORY = "out_of_memory"  #: the task does not fit this machine
    WORKER_ERROR = "worker_error"  #: anything else; message says what
