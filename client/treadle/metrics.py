"""Metrics of runs: logging them beside a training loop without holding it up, and reading them back.

What is logged goes in the order of the calls, many steps in one request while an earlier one is on its way. Repeating
a request changes nothing, so trouble on the way costs time only. Knows nothing of what is measured.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from treadle.channel import Transport
from treadle.convert import metric_point_from, sample_set_from
from treadle.errors import TreadleError, UnavailableError
from treadle.names import parse_run
from treadle.records import MetricPoint, MetricSeries, SampleSet, TextSample
from treadle.v1 import metrics_pb2, metrics_pb2_grpc

MAX_TEXT_BYTES: Final = 4000
"""Of a logged prompt, and of a logged response; what is longer loses its middle."""
_MAX_STEPS: Final = 256
_MAX_REQUEST_BYTES: Final = 2**20
_log = logging.getLogger(__name__)

Waiting = tuple[metrics_pb2.LoggedStep, "Future[None]"]


class MetricCalls:
    """The calls of a service client that concern metrics; they wait for their answer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._metrics = metrics_pb2_grpc.MetricsServiceStub(transport.ops_channel)

    def list_metrics(self, run: str, after_cursor: int = 0, from_step: int = 0) -> MetricSeries:
        """Returns a run's points in order of their last change: all, or those that changed behind a cursor.

        `MetricSeries.cursor` is where to go on. Of older points every second, every fourth and so on are kept.
        """
        request = metrics_pb2.ListMetricsRequest(
            run=str(parse_run(run)), after_cursor=after_cursor, from_step=from_step
        )
        points: list[MetricPoint] = []
        while True:
            page: metrics_pb2.ListMetricsResponse = self._transport.call(self._metrics.ListMetrics, request)
            points.extend(map(metric_point_from, page.points))
            request.after_cursor = page.cursor
            if not page.more:
                return MetricSeries(points, page.cursor)

    def list_samples(self, run: str, after_cursor: int = 0) -> list[SampleSet]:
        """Returns the texts that a run logged, in order of their last change."""
        request = metrics_pb2.ListSamplesRequest(run=str(parse_run(run)), after_cursor=after_cursor)
        found: list[SampleSet] = []
        while True:
            page: metrics_pb2.ListSamplesResponse = self._transport.call(self._metrics.ListSamples, request)
            found.extend(map(sample_set_from, page.sets))
            request.after_cursor = page.cursor
            if not page.more:
                return found


class MetricLog:
    """What one run logs; used from any thread."""

    def __init__(self, transport: Transport, run: str) -> None:
        self._transport = transport
        self._run = run
        self._stub = metrics_pb2_grpc.MetricsServiceStub(transport.ops_channel)
        self._waiting: deque[Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None

    def add(
        self, step: int, values: Mapping[str, float], samples: Sequence[str | Mapping[str, object] | TextSample]
    ) -> "Future[None]":
        """Queues what is to be logged; the future ends when the service has it."""
        message = metrics_pb2.LoggedStep(
            step=step,
            values={name: float(value) for name, value in values.items()},
            samples=[_sample_to_proto(sample) for sample in samples],
        )
        future: Future[None] = Future()
        self._transport.call_soon(lambda: self._queue(message, future))
        return future

    async def flush(self, seconds: float) -> None:
        """Waits until nothing waits any more, at most so long."""
        if self._sending is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.shield(self._sending)

    def _queue(self, message: metrics_pb2.LoggedStep, future: "Future[None]") -> None:
        self._waiting.append((message, future))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        batch: list[Waiting] = []
        try:
            while self._waiting:
                batch = self._next_batch()
                if not await self._send(batch, alone=len(batch) == 1):
                    # One of them is refused; the others must not be lost with it.
                    for each in batch:
                        await self._send([each], alone=True)
        except asyncio.CancelledError:
            for _, future in (*batch, *self._waiting):
                if not future.done():
                    future.set_exception(UnavailableError("the client was closed before the service had this"))
            raise

    def _next_batch(self) -> list[Waiting]:
        batch, num_bytes = [self._waiting.popleft()], 0
        while self._waiting and len(batch) < _MAX_STEPS:
            num_bytes += self._waiting[0][0].ByteSize()
            if num_bytes > _MAX_REQUEST_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _send(self, batch: list[Waiting], *, alone: bool) -> bool:
        request = metrics_pb2.LogMetricsRequest(run=self._run, steps=[message for message, _ in batch])
        try:
            await self._transport.call_async(self._stub.LogMetrics, request)
        except TreadleError as error:
            if not alone and not error.retryable:
                return False
            _log.warning("metrics of %s from step %d on were not kept: %s", self._run, batch[0][0].step, error)
            for _, future in batch:
                future.set_exception(error)
            return True
        for _, future in batch:
            future.set_result(None)
        return True


def _sample_to_proto(sample: str | Mapping[str, object] | TextSample) -> metrics_pb2.TextSample:
    if isinstance(sample, str):
        return metrics_pb2.TextSample(response=_shortened(sample))
    if isinstance(sample, TextSample):
        prompt, response, reward = sample.prompt, sample.response, sample.reward
    else:
        unknown = sample.keys() - {"prompt", "response", "reward"}
        if unknown:
            raise TypeError(f"a sample has prompt, response and reward, not {', '.join(sorted(unknown))}")
        prompt, response = str(sample.get("prompt", "")), str(sample.get("response", ""))
        worth = sample.get("reward")
        reward = None if worth is None else float(str(worth))
    return metrics_pb2.TextSample(prompt=_shortened(prompt), response=_shortened(response), reward=reward)


def _shortened(text: str) -> str:
    """Returns the text, or its beginning and end when it is too long."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_TEXT_BYTES:
        return data.decode()
    half = MAX_TEXT_BYTES // 2 - 8
    return f"{data[:half].decode(errors='ignore')} […] {data[-half:].decode(errors='ignore')}"
