"""Adapters that every tenant may read, and runs found by the adapter that they started from."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.add_column("adapters", sa.Column("public", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index(op.f("ix_adapters_run_kind_adapter"), "adapters", ["run", "kind", "adapter"])
    op.create_index(op.f("ix_runs_from_adapter"), "runs", ["from_adapter"])
