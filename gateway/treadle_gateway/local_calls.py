"""The gateway's own public methods, called from inside it: what the HTTP faces stand on.

A stub over a LocalChannel runs the very handlers that gRPC callers reach, with the same scopes, and without a
connection or a copy of the message in between; so routing, quotas and the state of operations exist once. Knows
nothing of HTTP. The principal must have been set in the task that calls.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc

from treadle.errors import TreadleError, from_rpc_error
from treadle.v1 import (
    adapters_pb2_grpc,
    admin_pb2_grpc,
    datasets_pb2_grpc,
    metrics_pb2_grpc,
    sampling_pb2_grpc,
    timeline_pb2_grpc,
    training_pb2_grpc,
)
from treadle_gateway.auth import REVOKE
from treadle_gateway.authenticator import Authenticator
from treadle_gateway.scopes import check_scope
from treadle_service.principal import current_principal

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]  # Any: each method has its own messages.
    Trailers = tuple[tuple[str, str | bytes], ...]


class LocalCalls:
    """Typed stubs of the public services. What fails raises the TreadleError itself, not an RpcError."""

    def __init__(self, handlers: Mapping[str, Handler], authenticator: Authenticator) -> None:
        # Any: a stub takes whatever behaves as a channel.
        channel: Any = LocalChannel(handlers, authenticator)
        self.training: training_pb2_grpc.TrainingServiceAsyncStub = training_pb2_grpc.TrainingServiceStub(channel)
        self.sampling: sampling_pb2_grpc.SamplingServiceAsyncStub = sampling_pb2_grpc.SamplingServiceStub(channel)
        self.adapters: adapters_pb2_grpc.AdapterServiceAsyncStub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.datasets: datasets_pb2_grpc.DatasetServiceAsyncStub = datasets_pb2_grpc.DatasetServiceStub(channel)
        self.admin: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(channel)
        self.metrics: metrics_pb2_grpc.MetricsServiceAsyncStub = metrics_pb2_grpc.MetricsServiceStub(channel)
        self.timeline: timeline_pb2_grpc.TimelineServiceAsyncStub = timeline_pb2_grpc.TimelineServiceStub(channel)


class LocalChannel:
    """Behaves towards generated stubs as a grpc.aio channel does."""

    def __init__(self, handlers: Mapping[str, Handler], authenticator: Authenticator) -> None:
        self._handlers = handlers
        self._authenticator = authenticator

    def unary_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        """Returns what calls a method with one request and one answer."""
        handler: Any = self._handlers[method]

        async def call(request: Any, *, timeout: float | None = None, **_: Any) -> Any:
            check_scope(current_principal(), method)
            context = LocalContext(timeout)
            try:
                # A typed handler takes and gives messages, a forwarding one their bytes.
                if handler.request_deserializer is not None:
                    return await handler.unary_unary(request, context)
                answer = await handler.unary_unary(request_serializer(request), context)
                return response_deserializer(answer)
            finally:
                context.done()
                if method == REVOKE:
                    self._authenticator.recheck()

        return call

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        """Returns what calls a method with one request and many answers; all of those forward bytes."""
        handler: Any = self._handlers[method]

        async def call(request: Any, *, timeout: float | None = None, **_: Any) -> AsyncIterator[Any]:
            check_scope(current_principal(), method)
            context = LocalContext(timeout)
            answers: Any = handler.unary_stream(request_serializer(request), context)
            try:
                async for answer in answers:
                    yield response_deserializer(answer)
            finally:
                await answers.aclose()
                context.done()

        return call

    def stream_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        """Returns what calls a method with many requests and one answer; all of those forward bytes."""
        handler: Any = self._handlers[method]

        async def call(requests: AsyncIterator[Any], *, timeout: float | None = None, **_: Any) -> Any:
            check_scope(current_principal(), method)
            context = LocalContext(timeout)
            frames = (request_serializer(request) async for request in requests)
            try:
                answer = await handler.stream_unary(frames, context)
                return response_deserializer(answer)
            finally:
                context.done()

        return call

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Any:
        """Returns what refuses: a stream of operations is for clients of their own; use the unary twins."""

        def call(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{method} has no local form")

        return call


class LocalContext:
    """As much of a ServicerContext as the gateway's handlers use."""

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._callbacks: list[Callable[[LocalContext], None]] = []

    def invocation_metadata(self) -> Trailers:
        """Returns no metadata: routing reads names from the requests themselves."""
        return ()

    def time_remaining(self) -> float | None:
        """Returns the seconds until the caller's deadline, None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def add_done_callback(self, callback: Callable[[LocalContext], None]) -> None:
        """Has `callback` called when the call is over."""
        self._callbacks.append(callback)

    def done(self) -> None:
        """Ends the call."""
        while self._callbacks:
            self._callbacks.pop()(self)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()) -> None:
        """Raises the error that an upstream ended the call with."""
        raise _error_of(code, details, trailing_metadata)


class _Failure(grpc.RpcError):
    """A status as an RpcError, so that it is read as those from the wire are."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Trailers) -> None:
        super().__init__(details)
        self._parts = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> Any:  # Any: the stub wants a class that has no constructor.
        return self._parts[2]


def _error_of(code: grpc.StatusCode, details: str, trailers: Trailers) -> TreadleError:
    return from_rpc_error(_Failure(code, details, trailers))
