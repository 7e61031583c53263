"""UsageService: translates calls of workers to quotas and usage. For services that act for themselves."""

from functools import partial
from typing import Final

from treadle.errors import make_error
from treadle.internal.v1 import usage_pb2, usage_pb2_grpc
from treadle_service.principal import INTERNAL_SCOPE, current_principal
from treadle_store import quotas, usage
from treadle_store.clock import Clock
from treadle_store.database import Database

MAX_TENANTS: Final = 1000


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """Keeps usage and the budgets that follow from quotas."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def GetBudgets(self, request: usage_pb2.GetBudgetsRequest, context: object) -> usage_pb2.GetBudgetsResponse:
        """Returns what tenants may still use."""
        current_principal().require(INTERNAL_SCOPE)
        if len(request.tenants) > MAX_TENANTS:
            raise make_error("BAD_VALUE", f"at most {MAX_TENANTS} tenants are asked for at once")
        body = partial(quotas.budgets_of, names=request.tenants, now_us=self._clock())
        return usage_pb2.GetBudgetsResponse(budgets=await self._database.read(body))

    async def ReportUsage(
        self, request: usage_pb2.ReportUsageRequest, context: object
    ) -> usage_pb2.ReportUsageResponse:
        """Records a sampler's use."""
        current_principal().require(INTERNAL_SCOPE)
        body = partial(usage.record_report, report=request, now_us=self._clock())
        return usage_pb2.ReportUsageResponse(budgets=await self._database.write(body))
