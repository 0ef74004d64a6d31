"""Claims know for how long the coordinator's own pauses kept their worker waiting."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "claims",
        sa.Column("paused_s", sa.Float(), server_default="0", nullable=False),
    )
