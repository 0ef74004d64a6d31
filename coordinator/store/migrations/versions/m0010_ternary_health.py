"""Scored versions have their ternary health."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "ternary_health",
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("before", sa.BigInteger(), nullable=True),
        sa.Column("matrices_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version"], ["versions.version"]),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"]),
        sa.PrimaryKeyConstraint("version"),
    )
