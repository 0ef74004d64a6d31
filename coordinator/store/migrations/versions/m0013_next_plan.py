"""A run may be asked to train by another plan, or further, from its next version on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("runs", sa.Column("next_plan_json", sa.Text(), nullable=True))
    op.add_column(
        "runs", sa.Column("next_token_budget", sa.BigInteger(), nullable=True)
    )
