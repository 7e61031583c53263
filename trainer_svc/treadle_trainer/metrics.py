"""What a trainer tells Prometheus about its state, read when it is scraped; what it counts is in `counters`."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING

from treadle_service.metrics import Labels, Reading
from treadle_trainer.resident import Place

if TYPE_CHECKING:
    from treadle_trainer.trainer import Trainer


def readings(trainer: Trainer) -> tuple[Reading, ...]:
    """Returns what is read from a trainer."""
    trace, settings = trainer.trace, trainer.settings
    base = {"base": trainer.info.name, "worker": settings.worker}

    def runs() -> Iterable[tuple[Labels, float]]:
        places = Tally(resident.place for resident in trainer.residents)
        return [({"place": place.name.lower()}, float(places[place])) for place in Place]

    return (
        Reading("treadle_trainer_info", "Which base is held", lambda: [(base, 1.0)], labels=("base", "worker")),
        Reading("treadle_trainer_runs", "Runs whose lease is held, by where their state is", runs, labels=("place",)),
        Reading("treadle_trainer_max_runs", "Runs that may be held", lambda: settings.max_resident_runs),
        Reading(
            "treadle_trainer_streams", "Open operation streams", lambda: sum(r.num_streams for r in trainer.residents)
        ),
        Reading("treadle_trainer_load", "Devices that the runs would keep busy", lambda: trainer.rebalancer.load),
        Reading("treadle_trainer_queued_operations", "Operations that wait or run", lambda: trainer.queue_depth),
        Reading(
            "treadle_trainer_oldest_wait_seconds",
            "How long the oldest waiting operation waits",
            lambda: _oldest(trainer),
        ),
        Reading(
            "treadle_trainer_unwritten_operations", "Results that are not durable yet", lambda: _unwritten(trainer)
        ),
        Reading("treadle_trainer_state_bytes", "Memory of the states of runs", lambda: _bytes(trainer)),
        Reading("treadle_trainer_lease_seconds", "Time until the first lease ends", lambda: _lease(trainer)),
        Reading("treadle_trainer_pace", "How much longer passes take than their measured cost", lambda: trainer.pace),
        Reading("treadle_trainer_helped_batches", "Batches that others help with", lambda: trainer.fan_out[0]),
        Reading("treadle_trainer_guests", "Runs of others that are helped here", lambda: trainer.fan_out[1]),
        Reading("treadle_trainer_passes", "Passes over the base", lambda: trace.num_passes, "counter"),
        Reading("treadle_trainer_shared_passes", "Passes of several runs", lambda: trace.num_shared_passes, "counter"),
        Reading("treadle_trainer_tokens", "Positions trained", lambda: trace.num_tokens, "counter"),
        Reading("treadle_trainer_busy_seconds", "Time in passes and steps", lambda: trace.busy_seconds, "counter"),
    )


def _oldest(trainer: Trainer) -> float:
    heads = [next(iter(resident.order), None) for resident in trainer.residents]
    waiting = [op.accepted_at for op in heads if op is not None and op.started_at is None]
    return time.monotonic() - min(waiting) if waiting else 0.0


def _unwritten(trainer: Trainer) -> float:
    return sum(resident.order.done_seq - resident.results.committed_seq for resident in trainer.residents)


def _bytes(trainer: Trainer) -> float:
    return sum(resident.state_bytes for resident in trainer.residents if resident.place is not Place.STORE)


def _lease(trainer: Trainer) -> float:
    ends = [resident.lease_until for resident in trainer.residents]
    return min(ends) - time.monotonic() if ends else trainer.settings.lease_seconds
