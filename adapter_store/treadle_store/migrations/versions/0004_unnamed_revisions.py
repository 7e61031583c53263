"""Revisions without a name, and when they were last used."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.add_column("adapters", sa.Column("unnamed", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("adapters", sa.Column("used_us", sa.BigInteger(), nullable=True))
