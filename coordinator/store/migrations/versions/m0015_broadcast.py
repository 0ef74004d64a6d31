"""Plans from before there were links say that versions come whole, as they did."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the field, whose default is another one since, to plans that lack it."""
    for table in ("runs", "versions"):
        op.execute(
            sa.text(
                f"UPDATE {table} SET plan_json = "  # noqa: S608 - names from above
                "json_insert(plan_json, '$.broadcast', 'exact')"
            )
        )
