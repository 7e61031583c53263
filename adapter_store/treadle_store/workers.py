"""The live trainers and samplers, by heartbeat. Kept in memory: after a restart the next heartbeats refill it.

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

    def live(self) -> list[workers_pb2.WorkerEntry]:
        """Returns the workers whose registration lasts, by worker id."""
        now = self._monotonic()
        self._registrations = {w: r for w, r in self._registrations.items() if r.ends_at > now}
        return [self._registrations[worker].entry for worker in sorted(self._registrations)]

    def bases(self) -> list[admin_pb2.BaseModel]:
        """Returns the bases that live workers hold, by name; a base may be trainable, sampleable or both."""
        merged: dict[str, admin_pb2.BaseModel] = {}
        for entry in self.live():
            base = merged.setdefault(entry.base.name, admin_pb2.BaseModel())
            trainable, sampleable = base.trainable, base.sampleable
            base.CopyFrom(entry.base)
            base.trainable = trainable or entry.worker.kind == admin_pb2.WORKER_KIND_TRAINER
            base.sampleable = sampleable or entry.worker.kind == admin_pb2.WORKER_KIND_SAMPLER
        return [merged[name] for name in sorted(merged)]
