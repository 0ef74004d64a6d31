"""When a worker lost its lease, for as long as it has not let go of the task."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("workers", sa.Column("lease_lost_at", sa.Float(), nullable=True))
