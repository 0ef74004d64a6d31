"""Plans say what makes local steps; those of before go on with AdamW."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the field, whose default is another one since, to all plans."""
    for table in ("runs", "versions"):
        op.execute(
            sa.text(
                f"UPDATE {table} SET plan_json = "  # noqa: S608 - names from above
                "json_set(plan_json, '$.local_optimiser', 'adamw')"
            )
        )
