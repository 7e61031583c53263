"""What was found when a run diverged."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.add_column("runs", sa.Column("divergence", sa.LargeBinary(), nullable=True))
