"""A version knows that its files were damaged when a run was to go back to it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; until now events said it, as long as they were kept."""
    op.add_column(
        "versions",
        sa.Column("damaged", sa.Boolean(), server_default=sa.text("0"), nullable=False),
    )
    op.execute(
        sa.text(
            "UPDATE versions SET damaged = 1 WHERE version IN "
            "(SELECT json_extract(body_json, '$.to_version') FROM events "
            "WHERE kind = 'rollback.refused')"
        )
    )
