"""Hands runs to other trainers of the base while this one has more to do than they, and takes runs that they offer.

Nobody decides for all: each trainer looks for itself, and the one that is offered a run has the last word (`balance`).
A run moves like on a drain, but for one thing: between its lease being given back and its streams ending, the trainer
that accepted it claims it, so that whoever connects again finds it there. Knows nothing of how a run is handed over or
loaded.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from treadle import names
from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import trainer_pb2
from treadle.v1 import admin_pb2
from treadle_service.logs import get_logger
from treadle_trainer import counters
from treadle_trainer.balance import LEAST_DEMAND, Expected, Movable, Move, Peer, improves, plan
from treadle_trainer.neighbors import Neighbors
from treadle_trainer.resident import Resident

if TYPE_CHECKING:
    from treadle_trainer.trainer import Trainer

_MOVES_AT_ONCE: Final = 4
log = get_logger(__name__)


class Rebalancer:
    """One trainer's part in keeping the loads of all even."""

    def __init__(self, trainer: Trainer, neighbors: Neighbors) -> None:
        self._trainer, self._neighbors, self._settings = trainer, neighbors, trainer.settings
        self._expected = Expected()

    @property
    def load(self) -> float:
        """How many devices the runs of this trainer would keep busy, those counted in that are on their way to it."""
        now = time.monotonic()
        here = sum(run.demand.value(now) for run in self._trainer.residents if not run.draining)
        return here + self._expected.load(now)

    @property
    def state_bytes(self) -> int:
        """Memory of the states of runs that are in use or on their way."""
        now = time.monotonic()
        used = sum(run.state_bytes for run in self._trainer.residents if run.demand.value(now) >= LEAST_DEMAND)
        return used + self._expected.num_bytes(now)

    def arrived(self, resident: Resident) -> None:
        """A run is here: what its last trainer knew of its demand is where this one begins."""
        demand = self._expected.arrived(resident.name)
        if demand is not None:
            resident.demand.assume(demand)

    def consider(self, offer: trainer_pb2.OfferRunRequest) -> bool:
        """Decides about a run that another trainer offers; expects it from now on if it is wanted."""
        trainer = self._trainer
        run = Movable(offer.run, offer.demand, offer.state_bytes)
        wanted = (
            self._settings.rebalance_seconds > 0
            and not trainer.draining
            and offer.base == trainer.info.name
            and self.state_bytes + run.num_bytes <= trainer.max_state_bytes
            and improves(offer.load, self.load, run.demand, self._settings.rebalance_gap)
        )
        if wanted:
            self._expected.promise(run, time.monotonic())
        return wanted

    async def take(self, run: str) -> None:
        """Claims and loads a run that its last trainer has given back; raises what a first operation would."""
        try:
            await self._trainer.open(run, names.parse_run(run).tenant)
        finally:
            self._expected.arrived(run)

    async def run_forever(self) -> None:
        """Looks at the others again and again; at once after a round in which all was taken that was offered."""
        if not self._settings.rebalance_seconds:
            return
        while True:
            await asyncio.sleep(self._settings.rebalance_seconds)
            while not self._trainer.draining and await self._give():
                pass

    async def close(self) -> None:
        """Closes the channels to other trainers."""
        await self._neighbors.close()

    async def _give(self) -> bool:
        """Hands over what should move now, a few runs; returns whether there may be more."""
        load, runs = self.load, self._movable()
        # Whoever has little to do need not ask what the others have.
        if not runs or load < self._settings.rebalance_gap:
            return False
        try:
            peers = await self._peers()
        except TreadleError as error:
            log.warning("peers_unknown", reason=error.reason, message=error.message)
            return False
        moves = plan(load, runs, peers, self._settings.rebalance_gap, _MOVES_AT_ONCE)
        given = await asyncio.gather(*[self._hand_over(move) for move in moves if await self._offer(move)])
        return len(given) == _MOVES_AT_ONCE

    async def _peers(self) -> list[Peer]:
        entries = await self._trainer.scan_trainers()
        await self._neighbors.retain(frozenset(entry.worker.address for entry in entries))
        return [
            Peer(entry.worker.worker, entry.worker.address, entry.worker.load)
            for entry in entries
            if _takes_runs(entry.worker) and entry.worker.worker != self._settings.worker
        ]

    def _movable(self) -> list[Movable]:
        """Returns the runs that have been here for long enough."""
        now = time.monotonic()
        since = now - self._settings.rebalance_stay_seconds
        return [
            Movable(run.name, run.demand.value(now), run.state_bytes)
            for run in self._trainer.residents
            if run.came_at <= since and not run.draining and run.closed is None and run.diverged is None
        ]

    async def _offer(self, move: Move) -> bool:
        try:
            accepted = await self._neighbors.offer(move, self._trainer.info.name)
        except TreadleError as error:
            counters.MOVES.labels("unanswered").inc()
            log.warning("offer_failed", run=move.run.run, to=move.peer.worker, reason=error.reason)
            return False
        if not accepted:
            counters.MOVES.labels("refused").inc()
        return accepted

    async def _hand_over(self, move: Move) -> None:
        run, peer = move.run.run, move.peer

        async def then() -> None:
            try:
                await self._neighbors.take(peer.address, run)
            except TreadleError as error:
                # It is free, and goes where gateways send its owner.
                counters.MOVES.labels("failed").inc()
                log.warning("take_failed", run=run, to=peer.worker, reason=error.reason, message=error.message)
            else:
                counters.MOVES.labels("moved").inc()

        began = time.monotonic()
        reason = f"{run} moves to a trainer with less to do; connect again and go on"
        await self._trainer.evict(run, make_error("WORKER_LOST", reason, 0.0), then)
        log.info(
            "run_moved",
            run=run,
            to=peer.worker,
            demand=round(move.run.demand, 3),
            load=round(move.load, 2),
            seconds=round(time.monotonic() - began, 3),
        )


def _takes_runs(worker: admin_pb2.Worker) -> bool:
    """Tells whether a worker is a trainer that runs may be offered to; those of older releases take none."""
    return worker.kind == admin_pb2.WORKER_KIND_TRAINER and not worker.draining and worker.HasField("load")
