"""Every table, in SQLAlchemy Core; `migrations/` makes them, this file describes them.

Times are Unix seconds UTC. The columns that end in `_json` hold JSON.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata: Final = MetaData()

#: BIGINT everywhere; on SQLite only INTEGER PRIMARY KEY counts up by itself.
Serial: Final = BigInteger().with_variant(Integer, "sqlite")

#: Small facts of this installation: the high-water mark of the lease clock.
facts: Final = Table(
    "facts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

#: What must never be shown: password hash, server secret.
secrets: Final = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

#: Browser sessions of operators; only the hash of the cookie is kept.
sessions: Final = Table(
    "sessions",
    metadata,
    Column("session_hash", String(64), primary_key=True),
    Column("operator", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
)

#: One training from version 1 (or a reset) to its end; owns all that follows.
runs: Final = Table(
    "runs",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("preset", String(32), nullable=False),
    Column("model_json", Text, nullable=False),
    Column("layout_hash", String(64), nullable=False),
    Column("tokenizer_hash", String(64), nullable=False),
    Column("corpus_hash", String(64), nullable=False),
    Column("plan_json", Text, nullable=False),
    Column("token_budget", BigInteger),
    Column("root_version", BigInteger, nullable=False),
    Column("epoch", Integer, nullable=False, server_default="0"),
    Column("tokens_accepted", BigInteger, nullable=False, server_default="0"),
    Column("created_at", Float, nullable=False),
    Column("stop_at", Float),
    Column("reset_from_version", BigInteger),
    Column("reset_acknowledged", Boolean, nullable=False, server_default=text("1")),
    # The version that the run is to go back to once its round is closed.
    Column("roll_back_to", BigInteger),
    # What `plan_json` and `token_budget` are to be from the next version on (0: no
    # end); both or neither.
    Column("next_plan_json", Text),
    Column("next_token_budget", BigInteger),
    # Training tasks that are done, and accepted tokens of the epoch without those that
    # were filtered: counted anew, each look of a page would take all rows of the run.
    Column("tasks_done", BigInteger, nullable=False, server_default="0"),
    Column("epoch_tokens_accepted", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("state IN ('running','paused','finished')", name="run_state"),
)

#: A stretch of a shard not yet trained, nor cut into a task, in this epoch.
ranges: Final = Table(
    "ranges",
    metadata,
    Column("range_id", Serial, primary_key=True),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("shard_id", String(64), nullable=False),
    Column("start_token", BigInteger, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    # Attempts that tasks on this stretch have used up: guards left their work out.
    Column("attempt", Integer, nullable=False, server_default="0"),
    CheckConstraint("num_tokens > 0", name="range_not_empty"),
)
Index("ix_ranges_next", ranges.c.run_id, ranges.c.epoch, ranges.c.range_id)

#: A round: the submissions that make one version from the last.
rounds: Final = Table(
    "rounds",
    metadata,
    Column("round_id", Serial, primary_key=True),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    Column("base_version", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("first_claim_at", Float),
    Column("first_submission_at", Float),
    Column("closed_at", Float),
    Column("version", BigInteger),
    # In force from when it opens to its end, whatever is chosen meanwhile.
    Column("round_s", Float, nullable=False, server_default="60"),
    # What it took, once it is closed (`coordinator.domain.round_time`).
    Column("overhead_s", Float),
    Column("shortest_s", Float),
    CheckConstraint("state IN ('open','closing','closed')", name="round_state"),
)
Index(
    "ux_rounds_live",
    rounds.c.run_id,
    unique=True,
    sqlite_where=text("state <> 'closed'"),
    postgresql_where=text("state <> 'closed'"),
)

#: One unit of work: K local steps on a stretch, or the score of one version.
tasks: Final = Table(
    "tasks",
    metadata,
    Column("task_id", String(64), primary_key=True),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("shard_id", String(64), nullable=False),
    Column("start_token", BigInteger, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("fixed_size", Boolean, nullable=False),
    Column("version", BigInteger),  # the version to score, for an evaluation
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("attempt", Integer, nullable=False, server_default="0"),
    # Leases ever given out; unlike an attempt, none is taken back on release.
    Column("num_leases", Integer, nullable=False, server_default="0"),
    Column("not_before_at", Float, nullable=False, server_default="0"),
    # The round that had it last and did not finish it: not claimed there again.
    Column("returned_round_id", BigInteger),
    Column("created_at", Float, nullable=False),
    Column("done_at", Float),
    # The lease; set exactly while the task is leased.
    Column("lease_hash", String(64)),
    Column("lease_claim_id", String(64)),
    Column("lease_worker_id", String(64)),
    Column("lease_terms_json", Text),
    Column("base_version", BigInteger),
    Column("round_id", BigInteger),
    Column("claimed_at", Float),
    Column("expires_at", Float),
    Column("hard_at", Float),
    Column("predicted_s", Float),
    # What the heartbeats of this lease reported.
    Column("tokens_done", BigInteger, nullable=False, server_default="0"),
    Column("bytes_done", BigInteger, nullable=False, server_default="0"),
    Column("cpu_s", Float, nullable=False, server_default="0"),
    Column("step_s", Float, nullable=False, server_default="0"),
    Column("progress_at", Float),
    # How long the coordinator itself stood still meanwhile.
    Column("paused_s", Float, nullable=False, server_default="0"),
    # When heartbeats began to come that show no progress; NULL: the last one did.
    Column("stalled_at", Float),
    # CPU seconds that had been reported when tokens or bytes rose last.
    Column("progress_cpu_s", Float),
    CheckConstraint("state IN ('pending','leased','done','failed')", name="task_state"),
    CheckConstraint("(state = 'leased') = (lease_hash IS NOT NULL)", name="task_lease"),
    CheckConstraint("kind IN ('train','evaluate')", name="task_kind"),
)
Index(
    "ix_tasks_pending",
    tasks.c.run_id,
    tasks.c.kind,
    tasks.c.epoch,
    tasks.c.created_at,
    tasks.c.task_id,
    sqlite_where=text("state = 'pending'"),
    postgresql_where=text("state = 'pending'"),
)
Index(
    "ix_tasks_leased",
    tasks.c.expires_at,
    sqlite_where=text("state = 'leased'"),
    postgresql_where=text("state = 'leased'"),
)
Index(
    "ux_tasks_claim",
    tasks.c.lease_claim_id,
    unique=True,
    sqlite_where=text("state = 'leased'"),
    postgresql_where=text("state = 'leased'"),
)
Index("ix_tasks_state", tasks.c.run_id, tasks.c.state)

#: Who claimed what in a round, and how it ended: the lanes of the page.
claims: Final = Table(
    "claims",
    metadata,
    Column("claim_seq", Serial, primary_key=True),
    Column("round_id", BigInteger, ForeignKey("rounds.round_id"), nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("task_id", String(64), nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("claimed_at", Float, nullable=False),
    Column("predicted_s", Float),
    Column("ended_at", Float),
    # back, expired, released, failed; void once the round starts over.
    Column("outcome", String(16)),
    # What was trained, as of the last progress or of the submission, and when.
    Column("tokens_done", BigInteger, nullable=False, server_default="0"),
    Column("progress_at", Float),
    # How long the worker waited meanwhile because the coordinator stood still.
    Column("paused_s", Float, nullable=False, server_default="0"),
    # What became of it (`coordinator.domain.accounting`).
    Column("fate", String(16)),
    # Of the lease; none where a result that comes late would be of no use.
    Column("lease_hash", String(64)),
)
Index("ix_claims_round", claims.c.round_id, claims.c.worker_id)
Index("ix_claims_worker", claims.c.worker_id, claims.c.claim_seq)
Index("ix_claims_task", claims.c.task_id, claims.c.claim_seq)
Index("ix_claims_lease", claims.c.lease_hash)

#: Tokens that a worker has trained in a run, by what became of them.
tallies: Final = Table(
    "tallies",
    metadata,
    Column("run_id", String(64), ForeignKey("runs.run_id"), primary_key=True),
    Column("worker_id", String(64), primary_key=True),
    Column("fate", String(16), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)

#: A pseudo-gradient: accepted, then applied to a version or filtered.
submissions: Final = Table(
    "submissions",
    metadata,
    Column("submission_id", String(64), primary_key=True),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    Column(
        "task_id", String(64), ForeignKey("tasks.task_id"), nullable=False, unique=True
    ),
    Column("round_id", BigInteger, ForeignKey("rounds.round_id"), nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("base_version", BigInteger, nullable=False),
    Column("version", BigInteger),
    Column("epoch", Integer, nullable=False),
    Column("shard_id", String(64), nullable=False),
    Column("start_token", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("loss_first", Float, nullable=False),
    Column("loss_last", Float, nullable=False),
    Column("loss_mean", Float, nullable=False),
    Column("claimed_at", Float, nullable=False),
    Column("accepted_at", Float, nullable=False),
    Column("compute_s", Float, nullable=False),
    Column("download_s", Float, nullable=False),
    Column("download_bytes", BigInteger, nullable=False),
    # From the first bytes of the body to its acceptance, by our own clock.
    Column("upload_s", Float),
    Column("cpu_s", Float, nullable=False),
    Column("codec", String(16), nullable=False),
    Column("payload_file", Text),
    Column("payload_bytes", BigInteger, nullable=False),
    Column("body_sha256", String(64), nullable=False),
    Column("answer_json", Text, nullable=False),
    # What the guards found out when its round was closed; empty before.
    Column("norm", Float),
    Column("size", Float),
    Column("factor", Float),
    Column("cosine", Float),
    CheckConstraint(
        "state IN ('accepted','applied','filtered')", name="submission_state"
    ),
    CheckConstraint(
        "(state = 'applied') = (version IS NOT NULL)", name="submission_version"
    ),
)
Index("ix_submissions_round", submissions.c.round_id)
Index("ix_submissions_accepted_at", submissions.c.run_id, submissions.c.accepted_at)
Index("ix_submissions_worker", submissions.c.worker_id, submissions.c.accepted_at)
Index("ix_submissions_version", submissions.c.run_id, submissions.c.version)

#: A weight version: two blobs, the published frame and the server state.
versions: Final = Table(
    "versions",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    # UNIQUE: history cannot fork. NULL for the root of a run.
    Column("parent", BigInteger, ForeignKey("versions.version"), unique=True),
    Column("round_id", BigInteger),
    Column("published_sha256", String(64), nullable=False),
    Column("published_bytes", BigInteger, nullable=False),
    Column("state_sha256", String(64), nullable=False),
    Column("state_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("tokens_total", BigInteger, nullable=False),
    Column("num_submissions", Integer, nullable=False),
    Column("train_loss", Float),
    Column("plan_json", Text, nullable=False),
    Column("pruned", Boolean, nullable=False, server_default=text("0")),
    # The earlier version that this one is again; no round led to it.
    Column("rolled_back_to", BigInteger),
    # Its files were, when the run was to go back to it.
    Column("damaged", Boolean, nullable=False, server_default=text("0")),
)
Index("ix_versions_run", versions.c.run_id, versions.c.version)

#: The score of one version on the held-out shard.
evaluations: Final = Table(
    "evaluations",
    metadata,
    Column("submission_id", String(64), primary_key=True),
    Column(
        "task_id", String(64), ForeignKey("tasks.task_id"), nullable=False, unique=True
    ),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    Column("version", BigInteger, nullable=False, unique=True),
    Column("worker_id", String(64), nullable=False),
    Column("nats", Float, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("compute_s", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("body_sha256", String(64), nullable=False),
    Column("answer_json", Text, nullable=False),
)

#: What the forward pass makes of a scored version, by matrix.
ternary_health: Final = Table(
    "ternary_health",
    metadata,
    Column(
        "version",
        BigInteger,
        ForeignKey("versions.version"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("run_id", String(64), ForeignKey("runs.run_id"), nullable=False),
    # The scored version that it is compared with.
    Column("before", BigInteger),
    # A list of `coordinator.domain.ternary_health.MatrixHealth`; empty: not known.
    Column("matrices_json", Text, nullable=False),
)

#: One registered training process. The id is a label, not a right.
workers: Final = Table(
    "workers",
    metadata,
    Column("worker_id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("cpu_model", Text, nullable=False),
    Column("isa", String(64), nullable=False),
    Column("threads", Integer, nullable=False),
    Column("package_version", String(64), nullable=False),
    Column("own_heartbeat_s", Float),
    Column("calibrated_tokens_per_s", Float),
    Column("registered_at", Float, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("draining", Boolean, nullable=False, server_default=text("0")),
    Column("tokens_per_s", Float),
    # Mean deviation of its tasks from that, as a share.
    Column("spread", Float),
    # Actual over predicted time of its recent tasks; empty before there are some.
    Column("duration_ratio", Float),
    Column("tasks_done", Integer, nullable=False, server_default="0"),
    Column("tasks_failed", Integer, nullable=False, server_default="0"),
    Column("tokens_accepted", BigInteger, nullable=False, server_default="0"),
    Column("quarantined_at", Float),
    Column("quarantine_reason", Text),
    # What it handed in before is not held against it any more.
    Column("judged_from", Float, nullable=False, server_default="0"),
    # When an operator put it away; empty again once it has come back.
    Column("gone_at", Float),
    # When its lease ended against its will; empty once a heartbeat names it no more.
    Column("lease_lost_at", Float),
)

#: What happened, in order: the story behind every number on the page.
events: Final = Table(
    "events",
    metadata,
    Column("event_id", Serial, primary_key=True),
    Column("at", Float, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("body_json", Text, nullable=False),
)

#: Log records that workers sent.
worker_logs: Final = Table(
    "worker_logs",
    metadata,
    Column("log_id", Serial, primary_key=True),
    Column("received_at", Float, nullable=False),
    Column("at", Float, nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("level", String(16), nullable=False),
    Column("event", String(100), nullable=False),
    Column("message", Text, nullable=False),
    Column("task_id", String(64)),
)
