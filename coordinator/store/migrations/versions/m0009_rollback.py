"""A run may be asked to go back to a version; a version knows which one it is again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("runs", sa.Column("roll_back_to", sa.BigInteger(), nullable=True))
    op.add_column(
        "versions", sa.Column("rolled_back_to", sa.BigInteger(), nullable=True)
    )
