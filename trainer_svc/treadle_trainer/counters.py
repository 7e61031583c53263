"""What a trainer counts as it happens, for Prometheus. Knows nothing of runs and tenants: their number has no bound."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Histogram

from treadle_service.metrics import COUNTS, SECONDS

_OPERATIONS = Counter("treadle_trainer_operations_total", "Operations that ended", ["kind", "reason"])
_QUEUED = Histogram("treadle_trainer_queued_seconds", "From acceptance to start", ["kind"], buckets=SECONDS)
_ANSWERED = Histogram("treadle_trainer_operation_seconds", "From acceptance to result", ["kind"], buckets=SECONDS)
WITHHELD: Final = Histogram(
    "treadle_trainer_withheld_seconds",
    "What durability adds: from a result that is there to the one that may be shown",
    buckets=SECONDS,
)
_PASS_SECONDS = Histogram("treadle_trainer_pass_seconds", "Passes over the base", buckets=SECONDS)
_PASS_RUNS = Histogram("treadle_trainer_pass_runs", "Runs that share a pass", buckets=COUNTS)
_PASS_TOKENS = Histogram("treadle_trainer_pass_tokens", "Positions of a pass", buckets=[2**n for n in range(4, 18)])
SNAPSHOTS: Final = Counter("treadle_trainer_snapshots_total", "Snapshots of runs", ["outcome"])
SNAPSHOT_BYTES: Final = Counter("treadle_trainer_snapshot_bytes_total", "Bytes of stored snapshots")
JOURNAL_WRITE: Final = Histogram("treadle_trainer_journal_write_seconds", "Group commits to the store", buckets=SECONDS)
JOURNAL_ENTRIES: Final = Histogram("treadle_trainer_journal_write_runs", "Runs in a group commit", buckets=COUNTS)
JOURNAL_FAILURES: Final = Counter("treadle_trainer_journal_failures_total", "Group commits that were not answered")
CLAIMS: Final = Counter("treadle_trainer_claims_total", "Runs taken over, new ones included", ["outcome"])
MOVES: Final = Counter("treadle_trainer_moves_total", "Runs offered to a trainer with less load", ["outcome"])
LEFT: Final = Counter("treadle_trainer_runs_left_total", "Runs that went elsewhere", ["reason"])
REPLAYED: Final = Counter("treadle_trainer_replayed_operations_total", "Operations computed again after a hand-over")
DIVERGED: Final = Counter("treadle_trainer_divergences_total", "Replays that gave other bits than the journal has")
LENT_CHUNKS: Final = Counter("treadle_trainer_lent_chunks_total", "Chunks of large batches lent out", ["outcome"])
GUEST_CHUNKS: Final = Counter("treadle_trainer_guest_chunks_total", "Other trainers' chunks taken in", ["outcome"])
FAN_OUT_BYTES: Final = Counter("treadle_trainer_fan_out_bytes_total", "Bytes between trainers, at home", ["what"])
ADD_SECONDS: Final = Counter("treadle_trainer_add_seconds_total", "Time in which gradients computed apart were added")
UNLIKE_TRAINERS: Final = Counter(
    "treadle_trainer_unlike_trainers_total", "Trainers found to compute other bits, which cannot help with batches"
)


def operation_ended(kind: str, reason: str, queued_seconds: float, seconds: float) -> None:
    """Counts an operation; `reason` is that of its error, or OK."""
    _OPERATIONS.labels(kind, reason).inc()
    _QUEUED.labels(kind).observe(max(queued_seconds, 0.0))
    _ANSWERED.labels(kind).observe(seconds)


def pass_ended(seconds: float, num_runs: int, num_tokens: int) -> None:
    """Counts a pass."""
    _PASS_SECONDS.observe(seconds)
    _PASS_RUNS.observe(num_runs)
    _PASS_TOKENS.observe(num_tokens)
