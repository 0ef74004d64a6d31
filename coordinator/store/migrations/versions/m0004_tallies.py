"""What became of trained tokens, and what each claim came to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add table and columns, and fill them from what is known already."""
    op.create_table(
        "tallies",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("worker_id", sa.String(64), nullable=False),
        sa.Column("fate", sa.String(16), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"]),
        sa.PrimaryKeyConstraint("run_id", "worker_id", "fate"),
    )
    op.add_column(
        "claims",
        sa.Column("tokens_done", sa.BigInteger(), server_default="0", nullable=False),
    )
    op.add_column("claims", sa.Column("progress_at", sa.Float(), nullable=True))
    op.add_column("claims", sa.Column("lease_hash", sa.String(64), nullable=True))
    op.add_column("claims", sa.Column("fate", sa.String(16), nullable=True))
    op.create_index("ix_claims_worker", "claims", ["worker_id", "claim_seq"])
    op.create_index("ix_claims_task", "claims", ["task_id", "claim_seq"])
    op.create_index("ix_claims_lease", "claims", ["lease_hash"])
    op.add_column("submissions", sa.Column("upload_s", sa.Float(), nullable=True))
    op.add_column("workers", sa.Column("spread", sa.Float(), nullable=True))
    op.add_column("workers", sa.Column("duration_ratio", sa.Float(), nullable=True))
    op.add_column(
        "tasks",
        sa.Column("paused_s", sa.Float(), server_default="0", nullable=False),
    )
    op.execute(
        "INSERT INTO tallies (run_id, worker_id, fate, tokens) "
        "SELECT run_id, worker_id, state, SUM(tokens) FROM submissions "
        "GROUP BY run_id, worker_id, state"
    )
    op.execute(
        "UPDATE claims SET tokens_done = num_tokens, progress_at = ended_at "
        "WHERE outcome = 'back'"
    )
    op.execute(
        "UPDATE claims SET lease_hash = (SELECT lease_hash FROM tasks "
        "WHERE tasks.task_id = claims.task_id AND tasks.round_id = claims.round_id) "
        "WHERE ended_at IS NULL"
    )
