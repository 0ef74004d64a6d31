"""Ranges know the attempts that were used up on them, so that no stretch loops."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "ranges",
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
    )
