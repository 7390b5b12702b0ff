"""Up to where what each outpost brought was taken."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "delivery_marks",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
