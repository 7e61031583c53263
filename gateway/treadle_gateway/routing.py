"""Which worker gets a call: pure functions over what is known of the workers.

A run goes to the holder of its lease. Without one, it goes to the first in its rendezvous order whose load is not far
above the mean (consistent hashing with bounded loads, https://arxiv.org/abs/1608.01350): gateways with the same list
pick the same trainer, so that they do not make two fight over a run, and a worker that comes or goes moves few. Runs
that have a holder are moved by trainers themselves. A run's revisions go to one sampler by the same hashing, and the
store tells that sampler of new ones ahead. Knows no gRPC and no clock.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from treadle.errors import TreadleError, make_error
from treadle.names import parse_adapter
from treadle_service import rendezvous

WorkerKind = Literal["trainer", "sampler"]

RETRY_SECONDS: Final = 1.0
# How much busier than the idlest a sampler may be before affinity to its cache is given up: loading an adapter
# again costs about as much as waiting behind this many requests.
_SLACK: Final = 8
# How far above the mean a trainer's load may be for it to be given a run: more spreads worse, less makes places change
# with every ripple of the loads.
_LOAD_SHARE, _LOAD_SLACK = 0.25, 0.1


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What routing needs to know of a worker."""

    worker: str
    kind: WorkerKind
    base: str
    address: str
    queue_depth: int = 0
    draining: bool = False
    load: float = 0.0
    """How many devices a trainer's runs would keep busy."""
    full: bool = False
    """The states of a trainer's runs that are in use take all the memory that they may."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a run's unexpired lease, and where it was when it took it."""

    worker: str
    address: str


@dataclass(frozen=True, slots=True)
class WorkerTable:
    """The live workers, and the bases that were ever seen with one."""

    workers: tuple[WorkerView, ...] = ()
    known_bases: frozenset[tuple[WorkerKind, str]] = frozenset()

    def refreshed(self, workers: Iterable[WorkerView]) -> "WorkerTable":
        """Returns the table with new workers; bases stay known when their last worker goes."""
        new = tuple(workers)
        return WorkerTable(new, self.known_bases | {(worker.kind, worker.base) for worker in new})

    def without(self, addresses: frozenset[str]) -> "WorkerTable":
        """Returns the table without the workers at `addresses`."""
        if not addresses:
            return self
        return WorkerTable(tuple(w for w in self.workers if w.address not in addresses), self.known_bases)

    def available(self, kind: WorkerKind, base: str) -> list[WorkerView]:
        """Returns the workers that take new work on `base`."""
        return [w for w in self.workers if w.kind == kind and w.base == base and not w.draining]

    def bases(self, kind: WorkerKind) -> list[str]:
        """Returns the names of the bases that workers of `kind` serve or served."""
        return sorted(base for known_kind, base in self.known_bases if known_kind == kind)


def rank(key: str, workers: Iterable[WorkerView]) -> list[WorkerView]:
    """Returns the workers by rendezvous hash, best first; removing one moves only the keys that it had."""
    by_id = {worker.worker: worker for worker in workers}
    return [by_id[worker] for worker in rendezvous.rank(key, by_id)]


def pick_trainer(table: WorkerTable, run: str, base: str, holder: Holder | None) -> str:
    """Returns the address of the trainer for a run, or raises NO_WORKER."""
    if holder is not None:
        # A restarted worker keeps its id and its leases but may have moved.
        return next((w.address for w in table.workers if w.worker == holder.worker), holder.address)
    trainers = table.available("trainer", base)
    if not trainers:
        raise no_worker("trainer", base)
    return place(run, trainers).address


def place(run: str, trainers: Sequence[WorkerView]) -> WorkerView:
    """Returns the trainer for a run that nobody holds; there must be one."""
    roomy = [trainer for trainer in trainers if not trainer.full] or trainers
    mean = math.fsum(trainer.load for trainer in roomy) / len(roomy)
    limit = (1 + _LOAD_SHARE) * mean + _LOAD_SLACK
    return next(trainer for trainer in rank(run, roomy) if trainer.load <= limit)


def pick_sampler(table: WorkerTable, base: str, adapter: str, in_flight: Mapping[str, int]) -> str:
    """Returns the address of the sampler for an adapter, or for the bare base when `adapter` is empty.

    Args:
        table: the workers.
        base: the base that is sampled, or that the adapter belongs to.
        adapter: a revision's name, or empty.
        in_flight: calls that this gateway has open at each address; the workers' own counts lag behind.

    Raises:
        TreadleError: NO_WORKER.
    """
    samplers = table.available("sampler", base)
    if not samplers:
        raise no_worker("sampler", base)
    load = {w.address: max(w.queue_depth, in_flight.get(w.address, 0)) for w in samplers}
    least = min(load.values())
    if not adapter:
        return min(samplers, key=lambda w: (load[w.address], w.worker)).address
    # By run, not by revision: samplers fetch a run's next revision where its last ones were asked for.
    run = str(parse_adapter(adapter).run_name)
    return next(w.address for w in rank(run, samplers) if load[w.address] <= 2 * least + _SLACK)


def no_worker(kind: WorkerKind, base: str) -> TreadleError:
    """Returns the error for a base whose workers are away."""
    return make_error("NO_WORKER", f"no {kind} of the base {base!r} is up; try again", RETRY_SECONDS)
