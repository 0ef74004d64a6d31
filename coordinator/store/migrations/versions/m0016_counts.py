"""Counts that the page shows, kept with the run: counting anew took all its rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add both columns, and fill them from what is known already."""
    for name in ("tasks_done", "epoch_tokens_accepted"):
        op.add_column(
            "runs",
            sa.Column(name, sa.BigInteger(), server_default="0", nullable=False),
        )
    op.execute(
        "UPDATE runs SET tasks_done = (SELECT COUNT(*) FROM tasks WHERE "
        "tasks.run_id = runs.run_id AND kind = 'train' AND tasks.state = 'done')"
    )
    op.execute(
        "UPDATE runs SET epoch_tokens_accepted = (SELECT COALESCE(SUM(tokens), 0) "
        "FROM submissions WHERE submissions.run_id = runs.run_id "
        "AND submissions.epoch = runs.epoch AND submissions.state <> 'filtered')"
    )
