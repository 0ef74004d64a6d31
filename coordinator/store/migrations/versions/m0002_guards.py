"""What the guards of a round find out, and the quarantine of workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the indexes that find them."""
    for name in ("norm", "size", "factor", "cosine"):
        op.add_column("submissions", sa.Column(name, sa.Float(), nullable=True))
    op.create_index(
        "ix_submissions_worker",
        "submissions",
        ["worker_id", "accepted_at"],
        unique=False,
    )
    op.create_index(
        "ix_submissions_version", "submissions", ["run_id", "version"], unique=False
    )
    op.add_column("workers", sa.Column("quarantined_at", sa.Float(), nullable=True))
    op.add_column("workers", sa.Column("quarantine_reason", sa.Text(), nullable=True))
    op.add_column(
        "workers",
        sa.Column("judged_from", sa.Float(), server_default="0", nullable=False),
    )
