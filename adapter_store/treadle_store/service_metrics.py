"""MetricsService: translates calls to the metrics of the calling tenant's runs."""

from functools import partial

from treadle.v1 import metrics_pb2, metrics_pb2_grpc
from treadle_store import metrics
from treadle_store.access import visible_run
from treadle_store.clock import Clock
from treadle_store.database import Database


class MetricsService(metrics_pb2_grpc.MetricsServiceServicer):
    """Keeps and returns the metrics of runs."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def LogMetrics(
        self, request: metrics_pb2.LogMetricsRequest, context: object
    ) -> metrics_pb2.LogMetricsResponse:
        """Adds what an owner logs."""
        name = visible_run(request.run)
        await self._database.write(partial(metrics.log_steps, name=name, steps=request.steps, now_us=self._clock()))
        return metrics_pb2.LogMetricsResponse()

    async def ListMetrics(
        self, request: metrics_pb2.ListMetricsRequest, context: object
    ) -> metrics_pb2.ListMetricsResponse:
        """Returns points."""
        name = visible_run(request.run)
        return await self._database.read(partial(metrics.list_metrics, name=name, request=request))

    async def ListSamples(
        self, request: metrics_pb2.ListSamplesRequest, context: object
    ) -> metrics_pb2.ListSamplesResponse:
        """Returns sampled texts."""
        name = visible_run(request.run)
        return await self._database.read(partial(metrics.list_samples, name=name, request=request))
