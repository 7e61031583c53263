"""The live trainers and samplers, by heartbeat.

Kept in memory: after a restart the next heartbeats refill it, and stores that share a database tell each other (see
worker_exchange).

Knows nothing of runs: who holds a run is said by its lease.
"""

from collections.abc import Callable
from dataclasses import dataclass

from treadle.errors import make_error
from treadle.internal.v1 import workers_pb2
from treadle.v1 import admin_pb2
from treadle_store.clock import Clock, to_timestamp


@dataclass(frozen=True, slots=True)
class _Registration:
    entry: workers_pb2.WorkerEntry
    ends_at: float


class WorkerRegistry:
    """Who was heard of lately. `monotonic` gives seconds and never jumps; `clock` dates what is shown."""

    def __init__(self, clock: Clock, monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._registrations: dict[str, _Registration] = {}
        # What other stores on the same database heard.
        self._elsewhere: dict[str, _Registration] = {}

    def beat(self, entry: workers_pb2.WorkerEntry, ttl_seconds: float) -> None:
        """Registers a worker for `ttl_seconds`. Raises BAD_NAME or BAD_VALUE."""
        if not entry.worker.worker:
            raise make_error("BAD_NAME", "a heartbeat must name its worker")
        if entry.worker.kind == admin_pb2.WORKER_KIND_UNSPECIFIED:
            raise make_error("BAD_VALUE", "a heartbeat must say what kind of worker it comes from")
        seen = workers_pb2.WorkerEntry()
        seen.CopyFrom(entry)
        seen.worker.last_seen.CopyFrom(to_timestamp(self._clock()))
        self._registrations[entry.worker.worker] = _Registration(seen, self._monotonic() + ttl_seconds)

    def remove(self, worker: str) -> None:
        """Forgets a worker; an unknown one is no error."""
        self._registrations.pop(worker, None)
        self._elsewhere.pop(worker, None)

    def live(self) -> list[workers_pb2.WorkerEntry]:
        """Returns the workers whose registration lasts, by worker id."""
        now = self._monotonic()
        self._registrations = {w: r for w, r in self._registrations.items() if r.ends_at > now}
        self._elsewhere = {w: r for w, r in self._elsewhere.items() if r.ends_at > now}
        # A worker that went over from one store to another is known by both: the later news counts.
        found = [*self._registrations.items(), *self._elsewhere.items()]
        newest = dict(sorted(found, key=lambda item: item[1].ends_at))
        return [newest[worker].entry for worker in sorted(newest)]

    def heard(self) -> list[tuple[workers_pb2.WorkerEntry, float]]:
        """Returns the workers that this store itself heard of, and for how many seconds more."""
        now = self._monotonic()
        return [(r.entry, r.ends_at - now) for r in self._registrations.values() if r.ends_at > now]

    def take_over(self, entries: list[tuple[workers_pb2.WorkerEntry, float]]) -> None:
        """Replaces what other stores heard, given with the seconds that each lasts."""
        now = self._monotonic()
        self._elsewhere = {entry.worker.worker: _Registration(entry, now + seconds) for entry, seconds in entries}

    def bases(self) -> list[admin_pb2.BaseModel]:
        """Returns the bases that live workers hold, by name; a base may be trainable, sampleable or both."""
        merged: dict[str, admin_pb2.BaseModel] = {}
        for entry in self.live():
            base = merged.setdefault(entry.base.name, admin_pb2.BaseModel())
            trainable, sampleable = base.trainable, base.sampleable
            budgets = [size for size in (base.max_tokens_per_pass, entry.base.max_tokens_per_pass) if size]
            base.CopyFrom(entry.base)
            base.max_tokens_per_pass = min(budgets, default=0)
            base.trainable = trainable or entry.worker.kind == admin_pb2.WORKER_KIND_TRAINER
            base.sampleable = sampleable or entry.worker.kind == admin_pb2.WORKER_KIND_SAMPLER
        return [merged[name] for name in sorted(merged)]
