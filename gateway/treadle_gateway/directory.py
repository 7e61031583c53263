"""What this gateway knows of the deployment: live workers, where runs are, which base an adapter belongs to.

All of it is the store's and only remembered for a moment. Answers that a tenant must not tell apart (absent, and
someone else's) are made the same here. Knows nothing of operations and prompts.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from treadle.channel import failure_of
from treadle.errors import TreadleError, make_error
from treadle.internal.v1 import journal_pb2, journal_pb2_grpc, workers_pb2, workers_pb2_grpc
from treadle.names import is_adapter, parse_adapter, parse_run
from treadle.v1 import admin_pb2
from treadle_gateway.cache import AsyncCache
from treadle_gateway.routing import Holder, WorkerKind, WorkerTable, WorkerView, no_worker, pick_trainer
from treadle_gateway.settings import GatewaySettings
from treadle_service.channels import internal_metadata
from treadle_service.logs import get_logger
from treadle_service.principal import Principal

log = get_logger(__name__)

# A worker that could not be reached is not chosen again for about as long as its registration outlives it.
SUSPECT_SECONDS: Final = 5.0
ADAPTER_CACHE_SECONDS: Final = 60.0
STORE_SECONDS: Final = 10.0
# The least time between two looks at the workers that a call may force.
_FORCED_REFRESH_SECONDS: Final = 0.1


def run_not_found(name: str) -> TreadleError:
    """Returns the one answer for a run that is absent and for one that is someone else's."""
    return make_error("RUN_NOT_FOUND", f"there is no run {name[:200]!r} of yours; list_runs shows those that there are")


def model_not_found(name: str) -> TreadleError:
    """Returns the one answer for a model that is absent and for one that is someone else's."""
    return make_error(
        "MODEL_NOT_FOUND",
        f"there is no model {name[:200]!r} for you: give the name of a saved revision of yours or of a served base",
    )


class Directory:
    """Answers where things are."""

    def __init__(
        self, settings: GatewaySettings, store: grpc.aio.Channel, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self.journal = journal_pb2_grpc.JournalServiceStub(store)
        self._workers = workers_pb2_grpc.WorkerServiceStub(store)
        self._table = WorkerTable()
        self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()
        self._suspects: dict[str, float] = {}
        self._runs: AsyncCache[str, journal_pb2.LookupRunResponse] = AsyncCache(settings.route_cache_seconds)
        self._adapter_bases: AsyncCache[str, str] = AsyncCache(ADAPTER_CACHE_SECONDS)

    @property
    def table(self) -> WorkerTable:
        """The workers that seem reachable."""
        now = self._clock()
        self._suspects = {address: until for address, until in self._suspects.items() if until > now}
        return self._table.without(frozenset(self._suspects))

    def internal_metadata(self, principal: Principal | None) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call to another service on behalf of `principal`."""
        return internal_metadata(self._settings.internal_token.get_secret_value(), principal)

    async def refresh(self, asked_at: float = float("inf")) -> None:
        """Looks at the list of workers, unless somebody else's look began after `asked_at`.

        Raises grpc.aio.AioRpcError when the store does not answer.
        """
        async with self._refreshing:
            if self._refreshed_at >= asked_at:
                return
            # One that fails was a look too: in front of a store that is silent, each caller in line would wait anew.
            self._refreshed_at = self._clock()
            answer = await self._workers.ScanWorkers(
                workers_pb2.ScanWorkersRequest(), metadata=self.internal_metadata(None), timeout=STORE_SECONDS
            )
            self._table = self._table.refreshed(filter(None, map(_view, answer.workers)))

    async def keep_fresh(self, on_refresh: Callable[[], Awaitable[None]]) -> None:
        """Refreshes for ever; an absent store is logged once and asked again."""
        absent = False
        while True:
            try:
                await self.refresh()
            except grpc.aio.AioRpcError as error:
                if not absent:
                    log.warning("store_unreachable", code=error.code().name)
                absent = True
            else:
                absent = False
                await on_refresh()
            await asyncio.sleep(self._settings.refresh_seconds)

    async def look_again(self) -> None:
        """Looks at the list of workers once more: done before a caller is told that there is nobody.

        Callers who ask at once share one look, and looks keep their distance, so that a flood of wrong names costs
        the store little.
        """
        asked_at = self._clock()
        await asyncio.sleep(max(0.0, self._refreshed_at + _FORCED_REFRESH_SECONDS - asked_at))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.refresh(asked_at)

    async def table_for(self, kind: WorkerKind, base: str) -> WorkerTable:
        """Returns the workers to choose from: the reachable ones of `base`; if there is none, the suspects too."""
        if not self.table.available(kind, base):
            await self.look_again()
        # A lone worker that was started again is a suspect for a while, and still the best there is.
        return self.table if self.table.available(kind, base) else self._table

    def lost(self, address: str) -> None:
        """Takes note that a worker could not be reached."""
        self._suspects[address] = self._clock() + SUSPECT_SECONDS

    def forget_run(self, name: str) -> None:
        """Drops what is remembered of a run's place."""
        self._runs.drop(name)

    async def lookup_run(self, name: str, principal: Principal) -> journal_pb2.LookupRunResponse:
        """Returns a run of the principal's tenant with its lease; raises RUN_NOT_FOUND, BAD_NAME."""
        if parse_run(name).tenant != principal.tenant:
            raise run_not_found(name)

        async def load() -> journal_pb2.LookupRunResponse:
            try:
                return await self.journal.LookupRun(
                    journal_pb2.LookupRunRequest(run=name),
                    metadata=self.internal_metadata(principal),
                    timeout=STORE_SECONDS,
                )
            except grpc.aio.AioRpcError as error:
                raised = store_error(error)
                raise run_not_found(name) if raised.reason == "RUN_NOT_FOUND" else raised from error

        return await self._runs.get(name, load)

    async def holds(self, name: str, address: str) -> bool:
        """Tells whether the trainer at `address` has a run's lease; it has while the store does not answer."""
        try:
            found = await self.journal.LookupRun(
                journal_pb2.LookupRunRequest(run=name), metadata=self.internal_metadata(None), timeout=STORE_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            return store_error(error).reason != "RUN_NOT_FOUND"
        return found.lease.address == address and found.lease.remaining.ToNanoseconds() > 0

    async def trainer_of(self, name: str, principal: Principal) -> str:
        """Returns the address of the trainer for a run; raises RUN_NOT_FOUND, BAD_NAME, NO_WORKER."""
        found = await self.lookup_run(name, principal)
        lease, base = found.lease, found.run.base
        holder = Holder(lease.holder, lease.address) if lease.holder and lease.remaining.ToNanoseconds() > 0 else None
        table = self.table if holder is not None else await self.table_for("trainer", base)
        return pick_trainer(table, name, base, holder)

    async def base_of_model(self, model: str, principal: Principal) -> tuple[str, str]:
        """Returns `(base, adapter)` of a model; adapter is empty for a base. Raises MODEL_NOT_FOUND, NO_WORKER."""
        if not is_adapter(model):
            if model not in self.table.bases("sampler"):
                await self.look_again()
            if model not in self.table.bases("sampler"):
                raise model_not_found(model) if self.table.bases("sampler") else no_worker("sampler", model)
            return model, ""
        name = parse_adapter(model)
        if name.kind != "revisions":
            raise model_not_found(model)

        async def load() -> str:
            try:
                answer = await self.journal.LookupAdapter(
                    journal_pb2.LookupAdapterRequest(name=model),
                    metadata=self.internal_metadata(principal),
                    timeout=STORE_SECONDS,
                )
            except grpc.aio.AioRpcError as error:
                raised = store_error(error)
                raise model_not_found(model) if raised.reason == "ADAPTER_NOT_FOUND" else raised from error
            return answer.adapter.base

        if name.tenant != principal.tenant:
            # Public at the moment, or not there: not remembered, since its owner may take it back.
            return await load(), model
        # A run's revisions share its base: a new one of a known run costs no question.
        return await self._adapter_bases.get(str(name.run_name), load), model


def store_error(error: grpc.aio.AioRpcError) -> TreadleError:
    """Returns the store's own error, or a retryable one when the store could not be reached."""
    raised, _ = failure_of(error)
    if raised.reason == "UNAVAILABLE":
        return make_error("UNAVAILABLE", "the adapter store cannot be reached now; try again", 1.0)
    return raised


_KINDS: Final[dict[int, WorkerKind]] = {
    admin_pb2.WORKER_KIND_TRAINER: "trainer",
    admin_pb2.WORKER_KIND_SAMPLER: "sampler",
}


def _view(entry: workers_pb2.WorkerEntry) -> WorkerView | None:
    worker = entry.worker
    kind = _KINDS.get(worker.kind)
    if kind is None:  # From a newer release.
        return None
    return WorkerView(
        worker.worker,
        kind,
        worker.base,
        worker.address,
        worker.queue_depth,
        worker.draining,
        worker.load,
        0 < worker.max_state_bytes <= worker.state_bytes,
    )
