"""The tables, in words that SQLite and PostgreSQL share.

The tenant is part of every primary key of tenant data. Times are microseconds since 1970. An xxh3 digest is an
unsigned 64-bit number and is stored as the signed number with the same bits. Saved adapters outlive their run, so
they carry no foreign key to it.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tenants: Final = Table(
    "tenants",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("created_us", BigInteger, nullable=False),
    Column("store_completions", Boolean, nullable=False, server_default=false()),
    # What `completions` holds of this tenant: kept up with every change, since a sum over all rows would take long.
    Column("completion_bytes", BigInteger, nullable=False, server_default="0"),
)

keys: Final = Table(
    "keys",
    metadata,
    Column("tenant", String(32), ForeignKey("tenants.tenant"), primary_key=True),
    Column("key_id", String(16), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("scopes", String(64), nullable=False),  # sorted, comma separated
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("revoked", Boolean, nullable=False),
    # RevokeKey names a key by its id alone.
    UniqueConstraint("key_id"),
)

quotas: Final = Table(
    "quotas",
    metadata,
    Column("tenant", String(32), ForeignKey("tenants.tenant"), primary_key=True),
    # Limits; NULL for none.
    Column("max_runs", BigInteger),
    Column("max_active_runs", BigInteger),
    Column("max_unfinished_operations", BigInteger),
    Column("training_tokens_per_minute", BigInteger),
    Column("sampling_tokens_per_minute", BigInteger),
    Column("max_stored_bytes", BigInteger),
    # When what was used so far will be paid for at the tenant's rate: one number is the whole token bucket.
    Column("training_paid_us", BigInteger, nullable=False),
    Column("sampling_paid_us", BigInteger, nullable=False),
)

# Use outlives the run that it was made by.
usage: Final = Table(
    "usage",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),  # empty for sampling from a base as it is
    Column("day", BigInteger, primary_key=True),  # days since 1970, UTC
    Column("num_operations", BigInteger, nullable=False),
    Column("training_tokens", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("sampled_tokens", BigInteger, nullable=False),
    Column("device_us", BigInteger, nullable=False),
)

# The last report of each life of a sampler: a repeat of it changes nothing.
usage_reporters: Final = Table(
    "usage_reporters",
    metadata,
    Column("reporter", String(128), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("reported_us", BigInteger, nullable=False),
)

runs: Final = Table(
    "runs",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("base", Text, nullable=False),
    Column("lora", LargeBinary, nullable=False),  # serialized treadle.v1.LoraConfig, defaults filled in
    Column("metadata", Text, nullable=False),  # JSON object of strings
    Column("request_id", String(128)),
    Column("request_sha256", String(64), nullable=False),
    Column("from_adapter", Text, nullable=False),
    Column("state", BigInteger, nullable=False),  # treadle.v1.RunState
    Column("last_seq", BigInteger, nullable=False),  # last appended
    Column("last_done_seq", BigInteger, nullable=False),  # every result up to here is recorded
    Column("acked_seq", BigInteger, nullable=False),  # every result up to here was delivered
    Column("created_us", BigInteger, nullable=False),
    Column("divergence", LargeBinary),  # serialized treadle.v1.Divergence of a diverged run
    # Counted here, because whoever writes a run's metrics holds its row: see metrics.
    Column("metric_cursor", BigInteger, nullable=False, server_default=text("0")),
    Column("num_recorded", BigInteger, nullable=False, server_default=text("0")),
    Column("num_logged", BigInteger, nullable=False, server_default=text("0")),
    Column("num_sampled", BigInteger, nullable=False, server_default=text("0")),
    Column("last_step", BigInteger),  # of the newest optimizer step
    # Makes deduplication safe under concurrent retries. SQL takes NULLs as distinct, so a run that was made without
    # a request id never clashes.
    UniqueConstraint("tenant", "request_id"),
    Index(None, "tenant", "created_us", "run"),
    Index(None, "from_adapter"),
)

_RUN = ["runs.tenant", "runs.run"]

leases: Final = Table(
    "leases",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("holder", String(128), nullable=False),  # empty once given back
    Column("address", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    ForeignKeyConstraint(["tenant", "run"], _RUN, ondelete="CASCADE"),
    Index(None, "holder"),
)

ops: Final = Table(
    "ops",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("digest", BigInteger, nullable=False),
    Column("payload", LargeBinary),  # both payload columns are NULL once a snapshot covers the op
    Column("payload_sha256", String(64)),
    ForeignKeyConstraint(["tenant", "run"], _RUN, ondelete="CASCADE"),
)

# Apart from `ops`, because writing a result into the op's row would write its payload a second time.
results: Final = Table(
    "results",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("result", LargeBinary, nullable=False),
    Column("state_digest", LargeBinary, nullable=False),  # empty when the op left the state alone
    ForeignKeyConstraint(["tenant", "run", "seq"], ["ops.tenant", "ops.run", "ops.seq"], ondelete="CASCADE"),
)

snapshots: Final = Table(
    "snapshots",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("state_digest", LargeBinary, nullable=False),
    ForeignKeyConstraint(["tenant", "run"], _RUN, ondelete="CASCADE"),
)

# One point per step and source.
metrics: Final = Table(
    "metrics",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("source", BigInteger, primary_key=True),  # treadle.v1.MetricSource
    Column("step", BigInteger, primary_key=True),
    Column("ordinal", BigInteger, nullable=False),  # place among the points of its source; says when it goes
    Column("cursor", BigInteger, nullable=False),  # grows with every change of the run's metrics
    Column("point", LargeBinary, nullable=False),  # serialized treadle.v1.MetricPoint
    ForeignKeyConstraint(["tenant", "run"], _RUN, ondelete="CASCADE"),
    Index(None, "tenant", "run", "cursor"),
)

# There are few: none is worth an index of its own.
sample_sets: Final = Table(
    "sample_sets",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("ordinal", BigInteger, nullable=False),
    Column("cursor", BigInteger, nullable=False),
    Column("samples", LargeBinary, nullable=False),  # serialized treadle.v1.SampleSet
    ForeignKeyConstraint(["tenant", "run"], _RUN, ondelete="CASCADE"),
)

adapters: Final = Table(
    "adapters",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("kind", String(16), primary_key=True),  # revisions or checkpoints
    Column("adapter", String(64), primary_key=True),
    Column("base", Text, nullable=False),
    Column("lora", LargeBinary, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),  # the op that saved it; 0 for an upload
    Column("created_us", BigInteger, nullable=False),
    # A deleted adapter stays readable for runs that started from it and have no snapshot of their own yet.
    Column("deleted_us", BigInteger),
    Column("unnamed", Boolean, nullable=False, server_default=false()),
    Column("used_us", BigInteger),  # last known use of an unnamed one
    Column("expires_us", BigInteger),  # when it goes by itself; NULL for never
    Column("metadata", Text, nullable=False, server_default="{}"),  # JSON object of strings
    Column("public", Boolean, nullable=False, server_default=false()),  # every tenant may read it
    Index(None, "tenant", "kind", "created_us"),
    Index(None, "run", "kind", "adapter"),
)

adapter_files: Final = Table(
    "adapter_files",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("adapter", String(64), primary_key=True),
    Column("path", String(64), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    ForeignKeyConstraint(
        ["tenant", "run", "kind", "adapter"],
        ["adapters.tenant", "adapters.run", "adapters.kind", "adapters.adapter"],
        ondelete="CASCADE",
    ),
)

completions: Final = Table(
    "completions",
    metadata,
    Column("tenant", String(32), ForeignKey("tenants.tenant"), primary_key=True),
    Column("completion", String(64), primary_key=True),
    Column("model", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("messages", LargeBinary, nullable=False),  # JSON array
    Column("response", LargeBinary, nullable=False),  # JSON object
    Index(None, "tenant", "model", "completion"),
)

# Metadata of completions, a row per entry, so that both databases can filter by it.
completion_tags: Final = Table(
    "completion_tags",
    metadata,
    Column("tenant", String(32), primary_key=True),
    Column("completion", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
    ForeignKeyConstraint(
        ["tenant", "completion"], ["completions.tenant", "completions.completion"], ondelete="CASCADE"
    ),
    Index(None, "tenant", "key", "value"),
)

# Nothing is swept while a hold lasts: a backup is copying blobs that its rows name.
holds: Final = Table(
    "holds",
    metadata,
    Column("hold", String(64), primary_key=True),
    Column("expires_us", BigInteger, nullable=False),
)

# Which store on this database heard of which worker; rows of a few seconds.
heard_workers: Final = Table(
    "heard_workers",
    metadata,
    Column("store", String(32), primary_key=True),
    Column("worker", String(128), primary_key=True),
    Column("entry", LargeBinary, nullable=False),  # serialized treadle.internal.v1.WorkerEntry
    Column("expires_us", BigInteger, nullable=False),
)
