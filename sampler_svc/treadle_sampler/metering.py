"""Who uses the sampler how much: lets requests in by their tenants' budgets, and reports what they used.

What was computed is charged, also of a request that its caller gave up. Reports are numbered, so that the store
counts each once however often it arrives; what a killed sampler had not reported is nobody's loss but the service's.
Knows nothing of how tokens are drawn.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from treadle.errors import TreadleError
from treadle.internal.v1 import usage_pb2
from treadle.names import is_adapter, parse_adapter
from treadle_service.budgets import TenantBudgets
from treadle_service.logs import get_logger
from treadle_service.store_client import StoreClient

REPORT_SECONDS: Final = 1.0
FRESH_SECONDS: Final = 10.0
_USES_PER_REPORT: Final = 1000
log = get_logger(__name__)

Key = tuple[str, str]


@dataclass(slots=True)
class Meter:
    """What one request has used; told as its tokens come."""

    use: Callable[[], usage_pb2.SamplingUse]
    num_tokens: int = 0

    def prompt(self, num_tokens: int) -> None:
        """Counts tokens of a prompt."""
        self.use().prompt_tokens += num_tokens
        self.num_tokens += num_tokens

    def sampled(self) -> None:
        """Counts a token that was drawn."""
        self.use().sampled_tokens += 1
        self.num_tokens += 1


class Metering:
    """The budgets of tenants, and the use that the store has not heard of; `run_forever` must be running."""

    def __init__(self, store: StoreClient, worker: str, busy_seconds: Callable[[], float]) -> None:
        """`busy_seconds` gives the device's time in steps since start."""
        self.budgets = TenantBudgets("sampling")
        self._store, self._busy_seconds = store, busy_seconds
        self._reporter = f"{worker}/{secrets.token_hex(8)}"
        self._seq = 0
        self._unreported: dict[Key, usage_pb2.SamplingUse] = {}
        self._reported_busy_seconds = 0.0
        self._report: usage_pb2.ReportUsageRequest | None = None

    @asynccontextmanager
    async def request(self, tenant: str, model: str, expected_tokens: int) -> AsyncIterator[Meter]:
        """Lets a request in, or raises RATE_LIMITED; services that act for themselves are not counted."""
        if not tenant:
            yield Meter(usage_pb2.SamplingUse)
            return
        await self._know(tenant)
        self.budgets.check(tenant)
        run = str(parse_adapter(model).run_name) if is_adapter(model) else ""
        meter = Meter(lambda: self._use(tenant, run))
        meter.use().num_requests += 1
        self.budgets.begin(tenant, expected_tokens)
        try:
            yield meter
        finally:
            self.budgets.end(tenant)
            # What was used stays counted until the store has charged it.
            self.budgets.release(tenant, expected_tokens - meter.num_tokens)

    async def run_forever(self) -> None:
        """Reports every second until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self.report()

    async def report(self) -> None:
        """Tells the store what was used since the last report, and asks anew for those who were refused."""
        try:
            while self._report is not None or self._unreported:
                await self._send(self._report or self._next_report())
            refused = self.budgets.tidy()
            if refused:
                self.budgets.learn(await self._store.get_budgets(refused[:_USES_PER_REPORT]))
        except TreadleError as error:
            log.warning("usage_unreported", reason=error.reason, message=error.message)

    async def _send(self, report: usage_pb2.ReportUsageRequest) -> None:
        # Kept until it is answered: the same report goes out again, under the same number.
        self._report = report
        budgets = await self._store.report_usage(report)
        self._report = None
        for use in report.uses:
            self.budgets.release(use.tenant, use.prompt_tokens + use.sampled_tokens)
        self.budgets.learn(budgets)

    def _next_report(self) -> usage_pb2.ReportUsageRequest:
        self._seq += 1
        keys = list(self._unreported)[:_USES_PER_REPORT]
        uses = [self._unreported.pop(key) for key in keys]
        busy_seconds = self._busy_seconds()
        busy_us, self._reported_busy_seconds = (busy_seconds - self._reported_busy_seconds) * 1e6, busy_seconds
        num_tokens = sum(use.prompt_tokens + use.sampled_tokens for use in uses)
        for use in uses:
            use.device_us = int(busy_us * (use.prompt_tokens + use.sampled_tokens) / max(num_tokens, 1))
        return usage_pb2.ReportUsageRequest(reporter=self._reporter, seq=self._seq, uses=uses)

    async def _know(self, tenant: str) -> None:
        """Asks for a tenant's budget unless it is known; a store that is away keeps nobody from sampling."""
        if self.budgets.is_fresh(tenant, FRESH_SECONDS):
            return
        try:
            self.budgets.learn(await self._store.get_budgets([tenant]))
        except TreadleError as error:
            log.warning("budget_unknown", tenant=tenant, reason=error.reason)

    def _use(self, tenant: str, run: str) -> usage_pb2.SamplingUse:
        key = (tenant, run)
        if key not in self._unreported:
            self._unreported[key] = usage_pb2.SamplingUse(tenant=tenant, run=run)
        return self._unreported[key]
