"""What verdicts and control need: CPU time at the last progress, workers put away."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("tasks", sa.Column("progress_cpu_s", sa.Float(), nullable=True))
    op.add_column("workers", sa.Column("gone_at", sa.Float(), nullable=True))
