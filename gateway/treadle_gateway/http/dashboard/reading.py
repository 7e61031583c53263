"""What pages read: asked of the gateway's own methods as the viewer, remembered for a moment for all who look.

However many browsers show a page, each thing is asked for once a second or so; curves are read from a cursor on. Knows
nothing of how it is drawn.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from treadle.names import parse_adapter, parse_run
from treadle.v1 import adapters_pb2, admin_pb2, metrics_pb2, timeline_pb2, training_pb2
from treadle_gateway.cache import AsyncCache
from treadle_gateway.http.dashboard.door import Viewer
from treadle_gateway.http.dashboard.series import RunSeries
from treadle_gateway.http.faces import HttpGateway
from treadle_service.principal import Principal, set_principal

RunStatus = Literal["running", "idle", "new", "finished", "interrupted", "diverged"]
FINAL: Final = "final"
_FRESH_SECONDS: Final = 1.5
_SLOW_SECONDS: Final = 5.0
_ACTIVE_SECONDS: Final = 30.0
_PAGE: Final = 500
_MAX_RUNS: Final = 2000
_AT_ONCE: Final = 8
_KEPT_SERIES: Final = 64
_KEPT_SAMPLES: Final = 64


@dataclass(frozen=True, slots=True)
class RunView:
    """A run in a list."""

    run: training_pb2.Run
    tenant: str
    label: str
    status: RunStatus
    tokens: int
    cost: float
    planned_steps: int
    """0 when nobody said how many there will be."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.run.latest.step

    @property
    def metadata(self) -> dict[str, str]:
        """What the owner wrote on it."""
        return dict(self.run.metadata)


@dataclass(slots=True)
class _Book:
    """What is remembered of a run's curves and texts."""

    series: RunSeries
    samples: dict[int, metrics_pb2.SampleSet]
    samples_cursor: int
    lock: asyncio.Lock
    read_at: float = float("-inf")


class Reader:
    """Reads for all pages of one gateway."""

    def __init__(self, gateway: HttpGateway, clock: Callable[[], float] = time.time) -> None:
        self._calls = gateway.calls
        self._price = gateway.settings.price_per_million_tokens
        self._clock = clock
        self._lists: AsyncCache[tuple[str, str], Any] = AsyncCache(_FRESH_SECONDS)  # Any: each key has its own type.
        self._slow: AsyncCache[tuple[str, str], Any] = AsyncCache(_SLOW_SECONDS)
        self._books: OrderedDict[str, _Book] = OrderedDict()

    async def runs(self, viewer: Viewer) -> list[RunView]:
        """Returns the viewer's runs, newest first; an administrator's are everybody's."""
        if not viewer.is_admin:
            return await self._runs_of(viewer.principal)

        async def everybodys() -> list[RunView]:
            set_principal(viewer.acting_for(viewer.tenant))
            tenants = (await self._calls.admin.ListTenants(admin_pb2.ListTenantsRequest())).tenants
            gate = asyncio.Semaphore(_AT_ONCE)

            async def one(tenant: str) -> list[RunView]:
                async with gate:
                    return await self._runs_of(viewer.acting_for(tenant))

            found = await asyncio.gather(*(one(tenant.tenant) for tenant in tenants))
            views = [view for views in found for view in views]
            return sorted(views, key=lambda view: view.run.created.ToNanoseconds(), reverse=True)[:_MAX_RUNS]

        found: list[RunView] = await self._lists.get(("runs", ""), everybodys)
        return found

    async def run(self, viewer: Viewer, name: str) -> RunView:
        """Returns one run; raises RUN_NOT_FOUND."""
        principal = viewer.acting_for_run(name)

        async def load() -> RunView:
            set_principal(principal)
            answer = await self._calls.training.GetRun(training_pb2.GetRunRequest(name=name))
            tenant = parse_run(name).tenant
            uses, finished = await asyncio.gather(self._usage_of(principal), self._finished_of(principal))
            return self._view(answer.run, tenant, uses.get(name, 0), is_finished=name in finished)

        view: RunView = await self._lists.get((name, "run"), load)
        return view

    async def series(self, viewer: Viewer, name: str) -> RunSeries:
        """Returns a run's curves as they are now; raises RUN_NOT_FOUND."""
        set_principal(viewer.acting_for_run(name))
        book = self._book(name)
        async with book.lock:
            if time.monotonic() - book.read_at >= _FRESH_SECONDS / 2:
                await self._read_on(name, book)
        return book.series

    async def samples(self, viewer: Viewer, name: str) -> list[metrics_pb2.SampleSet]:
        """Returns a run's texts, the latest step first; raises RUN_NOT_FOUND."""
        await self.series(viewer, name)
        samples = self._book(name).samples
        return [samples[step] for step in sorted(samples, reverse=True)]

    async def saved(self, viewer: Viewer, run: str) -> list[adapters_pb2.Adapter]:
        """Returns what was saved of a run, newest first."""
        principal = viewer.acting_for_run(run)

        async def load() -> list[adapters_pb2.Adapter]:
            set_principal(principal)
            revisions, checkpoints = await asyncio.gather(
                self._calls.adapters.ListRevisions(adapters_pb2.ListRevisionsRequest(run=run, page_size=_PAGE)),
                self._calls.adapters.ListCheckpoints(adapters_pb2.ListCheckpointsRequest(run=run, page_size=_PAGE)),
            )
            found = [*revisions.revisions, *checkpoints.checkpoints]
            return sorted(found, key=lambda adapter: adapter.created.ToNanoseconds(), reverse=True)

        found: list[adapters_pb2.Adapter] = await self._lists.get((run, "saved"), load)
        return found

    async def spans(self, viewer: Viewer, seconds: float) -> timeline_pb2.ListSpansResponse:
        """Returns what workers did in the last seconds, as the viewer may see it."""
        set_principal(viewer.principal)
        request = timeline_pb2.ListSpansRequest()
        request.after.FromNanoseconds(int((self._clock() - seconds) * 1e9))
        return await self._calls.timeline.ListSpans(request)

    async def bases(self, viewer: Viewer) -> list[admin_pb2.BaseModel]:
        """Returns the bases that a run can be started on."""

        async def load() -> list[admin_pb2.BaseModel]:
            set_principal(viewer.principal)
            answer = await self._calls.admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest())
            return [base for base in answer.bases if base.trainable]

        found: list[admin_pb2.BaseModel] = await self._slow.get(("bases", ""), load)
        return found

    async def _runs_of(self, principal: Principal) -> list[RunView]:
        async def load() -> list[RunView]:
            set_principal(principal)
            found: list[training_pb2.Run] = []
            request = training_pb2.ListRunsRequest(page_size=_PAGE)
            while len(found) < _MAX_RUNS:
                page = await self._calls.training.ListRuns(request)
                found.extend(page.runs)
                request.page_token = page.next_page_token
                if not request.page_token:
                    break
            uses, finished = await asyncio.gather(self._usage_of(principal), self._finished_of(principal))
            return [
                self._view(run, principal.tenant, uses.get(run.name, 0), is_finished=run.name in finished)
                for run in found
            ]

        views: list[RunView] = await self._lists.get((principal.tenant, "runs"), load)
        return views

    async def _usage_of(self, principal: Principal) -> dict[str, int]:
        """Returns the tokens that were used by each run of a tenant, trained and sampled."""

        async def load() -> dict[str, int]:
            set_principal(principal)
            tokens: dict[str, int] = {}
            request = admin_pb2.GetUsageRequest(tenant=principal.tenant, page_size=_PAGE)
            while True:
                page = await self._calls.admin.GetUsage(request)
                for used in page.runs:
                    use = used.usage
                    tokens[used.run] = use.training_tokens + use.prompt_tokens + use.sampled_tokens
                request.page_token = page.next_page_token
                if not request.page_token:
                    return tokens

        uses: dict[str, int] = await self._slow.get((principal.tenant, "usage"), load)
        return uses

    async def _finished_of(self, principal: Principal) -> set[str]:
        """Returns the runs of a tenant that a recipe has published the end of."""

        async def load() -> set[str]:
            set_principal(principal)
            request = adapters_pb2.ListRevisionsRequest(page_size=_PAGE)
            answer = await self._calls.adapters.ListRevisions(request)
            names = map(parse_adapter, (found.name for found in answer.revisions))
            return {str(name.run_name) for name in names if name.adapter == FINAL}

        finished: set[str] = await self._slow.get((principal.tenant, "finished"), load)
        return finished

    def _view(self, run: training_pb2.Run, tenant: str, tokens: int, *, is_finished: bool) -> RunView:
        planned = planned_steps(run)
        return RunView(
            run=run,
            tenant=tenant,
            label=run.metadata.get("name") or run.name.rpartition("/")[2],
            status=status_of(run, self._clock(), planned, is_finished=is_finished),
            tokens=tokens,
            cost=tokens / 1e6 * self._price,
            planned_steps=planned,
        )

    def _book(self, name: str) -> _Book:
        book = self._books.get(name)
        if book is None:
            book = self._books[name] = _Book(RunSeries(), {}, 0, asyncio.Lock())
        self._books.move_to_end(name)
        while len(self._books) > _KEPT_SERIES:
            self._books.popitem(last=False)
        return book

    async def _read_on(self, name: str, book: _Book) -> None:
        more = True
        while more:
            points = await self._calls.metrics.ListMetrics(
                metrics_pb2.ListMetricsRequest(run=name, after_cursor=book.series.cursor)
            )
            book.series.add(points)
            more = points.more
        more = True
        while more:
            texts = await self._calls.metrics.ListSamples(
                metrics_pb2.ListSamplesRequest(run=name, after_cursor=book.samples_cursor)
            )
            book.samples |= {found.step: found for found in texts.sets}
            book.samples_cursor, more = texts.cursor, texts.more
        for step in sorted(book.samples)[:-_KEPT_SAMPLES]:
            del book.samples[step]
        book.read_at = time.monotonic()


def planned_steps(run: training_pb2.Run) -> int:
    """Returns how many steps a recipe plans for its run, 0 when nobody said."""
    try:
        plan = json.loads(run.metadata.get("plan", ""))
    except ValueError:
        return 0
    steps = plan.get("steps", 0) if isinstance(plan, dict) else 0
    return steps if isinstance(steps, int) else 0


def status_of(run: training_pb2.Run, now: float, planned: int, *, is_finished: bool) -> RunStatus:
    """Returns what a run does now, as far as its newest step tells."""
    if run.state == training_pb2.RUN_STATE_DIVERGED:
        return "diverged"
    if is_finished or (planned and run.latest.step >= planned):
        return "finished"
    newest = run.latest.time if run.HasField("latest") else run.created
    active = now - newest.ToNanoseconds() / 1e9 < _ACTIVE_SECONDS
    if active and run.HasField("latest"):
        return "running"
    if planned and not active:
        return "interrupted"
    return "idle" if run.HasField("latest") else "new"
