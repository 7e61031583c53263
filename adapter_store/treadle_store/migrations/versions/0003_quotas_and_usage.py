"""Quotas of tenants and what they have used."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.create_table(
        "quotas",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("max_runs", sa.BigInteger(), nullable=True),
        sa.Column("max_active_runs", sa.BigInteger(), nullable=True),
        sa.Column("max_unfinished_operations", sa.BigInteger(), nullable=True),
        sa.Column("training_tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("sampling_tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("training_paid_us", sa.BigInteger(), nullable=False),
        sa.Column("sampling_paid_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_quotas_tenant_tenants")),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_quotas")),
    )
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("day", sa.BigInteger(), nullable=False),
        sa.Column("num_operations", sa.BigInteger(), nullable=False),
        sa.Column("training_tokens", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("sampled_tokens", sa.BigInteger(), nullable=False),
        sa.Column("device_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "run", "day", name=op.f("pk_usage")),
    )
    op.create_table(
        "usage_reporters",
        sa.Column("reporter", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("reported_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("reporter", name=op.f("pk_usage_reporters")),
    )
