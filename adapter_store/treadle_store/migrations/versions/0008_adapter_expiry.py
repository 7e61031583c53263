"""When saved adapters go by themselves, and what their owners wrote on them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.add_column("adapters", sa.Column("expires_us", sa.BigInteger(), nullable=True))
    op.add_column("adapters", sa.Column("metadata", sa.Text(), server_default="{}", nullable=False))


def downgrade() -> None:
    """Undoes it."""
    op.drop_column("adapters", "metadata")
    op.drop_column("adapters", "expires_us")
