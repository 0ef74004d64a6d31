"""Rounds know their round time, and what they took beside training."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; rounds of runs until now had the round time of their plan."""
    op.add_column(
        "rounds", sa.Column("round_s", sa.Float(), server_default="60", nullable=False)
    )
    op.add_column("rounds", sa.Column("overhead_s", sa.Float()))
    op.add_column("rounds", sa.Column("shortest_s", sa.Float()))
    connection = op.get_bind()
    plans = connection.execute(sa.text("SELECT run_id, plan_json FROM runs")).all()
    for run_id, plan_json in plans:
        connection.execute(
            sa.text("UPDATE rounds SET round_s = :round_s WHERE run_id = :run_id"),
            {"run_id": run_id, "round_s": json.loads(plan_json)["round_s"]},
        )
