"""Completions that tenants keep, and their consent to it."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.add_column("tenants", sa.Column("store_completions", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("tenants", sa.Column("completion_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "completions",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("completion", sa.String(length=64), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("messages", sa.LargeBinary(), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_completions_tenant_tenants")),
        sa.PrimaryKeyConstraint("tenant", "completion", name=op.f("pk_completions")),
    )
    op.create_index(op.f("ix_completions_tenant_model_completion"), "completions", ["tenant", "model", "completion"])
    op.create_table(
        "completion_tags",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("completion", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.String(length=512), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "completion"],
            ["completions.tenant", "completions.completion"],
            name=op.f("fk_completion_tags_tenant_completion_completions"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "completion", "key", name=op.f("pk_completion_tags")),
    )
    op.create_index(op.f("ix_completion_tags_tenant_key_value"), "completion_tags", ["tenant", "key", "value"])
