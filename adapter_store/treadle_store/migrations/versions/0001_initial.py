"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Applies the change."""
    op.create_table(
        "adapters",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("adapter", sa.String(length=64), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("lora", sa.LargeBinary(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("deleted_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "run", "kind", "adapter", name=op.f("pk_adapters")),
    )
    op.create_index(op.f("ix_adapters_tenant_kind_created_us"), "adapters", ["tenant", "kind", "created_us"])

    op.create_table(
        "runs",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("lora", sa.LargeBinary(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("from_adapter", sa.Text(), nullable=False),
        sa.Column("state", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_done_seq", sa.BigInteger(), nullable=False),
        sa.Column("acked_seq", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "run", name=op.f("pk_runs")),
        sa.UniqueConstraint("tenant", "request_id", name=op.f("uq_runs_tenant_request_id")),
    )
    op.create_index(op.f("ix_runs_tenant_created_us_run"), "runs", ["tenant", "created_us", "run"])

    op.create_table(
        "tenants",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_tenants")),
    )
    op.create_table(
        "adapter_files",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("adapter", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "run", "kind", "adapter"],
            ["adapters.tenant", "adapters.run", "adapters.kind", "adapters.adapter"],
            name=op.f("fk_adapter_files_tenant_run_kind_adapter_adapters"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "run", "kind", "adapter", "path", name=op.f("pk_adapter_files")),
    )
    op.create_table(
        "keys",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.String(length=64), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=True),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"], name=op.f("fk_keys_tenant_tenants")),
        sa.PrimaryKeyConstraint("tenant", "key_id", name=op.f("pk_keys")),
        sa.UniqueConstraint("key_id", name=op.f("uq_keys_key_id")),
    )
    op.create_table(
        "leases",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "run"], ["runs.tenant", "runs.run"], name=op.f("fk_leases_tenant_run_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant", "run", name=op.f("pk_leases")),
    )
    op.create_index(op.f("ix_leases_holder"), "leases", ["holder"])

    op.create_table(
        "ops",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("payload_sha256", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant", "run"], ["runs.tenant", "runs.run"], name=op.f("fk_ops_tenant_run_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant", "run", "seq", name=op.f("pk_ops")),
    )
    op.create_table(
        "snapshots",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state_digest", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "run"],
            ["runs.tenant", "runs.run"],
            name=op.f("fk_snapshots_tenant_run_runs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "run", name=op.f("pk_snapshots")),
    )
    op.create_table(
        "results",
        sa.Column("tenant", sa.String(length=32), nullable=False),
        sa.Column("run", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("result", sa.LargeBinary(), nullable=False),
        sa.Column("state_digest", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "run", "seq"],
            ["ops.tenant", "ops.run", "ops.seq"],
            name=op.f("fk_results_tenant_run_seq_ops"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "run", "seq", name=op.f("pk_results")),
    )
