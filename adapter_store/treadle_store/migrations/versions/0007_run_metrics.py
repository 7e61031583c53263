"""Metrics of runs and the texts that they sampled."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    for counter in ("metric_cursor", "num_recorded", "num_logged", "num_sampled"):
        op.add_column("runs", sa.Column(counter, sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("runs", sa.Column("last_step", sa.BigInteger(), nullable=True))
    op.create_table(
        "metrics",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("source", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("point", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "run"], ["runs.tenant", "runs.run"], name=op.f("fk_metrics_tenant_run_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant", "run", "source", "step", name=op.f("pk_metrics")),
    )
    op.create_index(op.f("ix_metrics_tenant_run_cursor"), "metrics", ["tenant", "run", "cursor"])
    op.create_table(
        "sample_sets",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("samples", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "run"],
            ["runs.tenant", "runs.run"],
            name=op.f("fk_sample_sets_tenant_run_runs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "run", "step", name=op.f("pk_sample_sets")),
    )
