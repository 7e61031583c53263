"""Server interceptors: exceptions become rich statuses; calls between services prove that they are such.

Handlers are wrapped, not replaced, so that raw-bytes handlers work like typed ones. The one broad `except` of the
project is here: whatever a handler raises becomes an answer, is logged, and touches no other call.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from treadle.errors import TreadleError, make_error, to_status
from treadle_service import request_ids
from treadle_service.logs import get_logger
from treadle_service.metrics import observing_call
from treadle_service.principal import INTERNAL_SCOPE, Principal, set_principal
from treadle_service.tracing import HEADER, TRACING

if TYPE_CHECKING:
    # Request and response types of a wrapped handler are its own business.
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]


class RunningCall:
    """A call that is being answered, and the way to end it from outside its own task."""

    def __init__(self, on_done: Callable[[Callable[[], None]], None]) -> None:
        """`on_done` takes what to call when gRPC is through with the call, however it ends."""
        self.on_done = on_done
        self.ended: TreadleError | None = None
        self._task = asyncio.current_task()

    def end(self, error: TreadleError) -> None:
        """Stops the handler; the caller gets `error`. A call that has been ended already stays as it is."""
        if self.ended is None and self._task is not None and not self._task.done():
            self.ended = error
            self._task.cancel()


EXEMPT_SERVICES: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.")
log = get_logger(__name__)


class WrappingInterceptor(grpc.aio.ServerInterceptor):
    """Runs `before` in the task of each call, then the handler, and turns exceptions into statuses."""

    believes_callers: ClassVar[bool] = False
    """Whether callers say in which trace and request a call belongs; else it begins one of each."""

    async def before(self, details: grpc.HandlerCallDetails) -> None:
        """Does nothing; a subclass may raise to refuse the call."""

    def entered(self, details: grpc.HandlerCallDetails, call: RunningCall) -> None:
        """Does nothing; a subclass may count the call in, or raise to refuse it."""

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Wraps the handler that the rest of the chain chose."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(EXEMPT_SERVICES):
            return handler
        return _wrap(handler, details, self)


class ErrorInterceptor(WrappingInterceptor):
    """Turns exceptions into statuses and does nothing else."""


class InternalAuthInterceptor(WrappingInterceptor):
    """Lets in only callers that know the deployment's internal token, and takes the principal from them."""

    believes_callers = True

    def __init__(self, token: str) -> None:
        """Raises ValueError for an empty token: it would let everybody in."""
        if not token:
            raise ValueError("set the internal token, the secret that all services of a deployment share")
        self._expected = f"Bearer {token}".encode()

    async def before(self, details: grpc.HandlerCallDetails) -> None:
        """Sets the principal, or raises UNAUTHENTICATED."""
        metadata = {key: value for key, value in details.invocation_metadata if isinstance(value, str)}
        if not hmac.compare_digest(metadata.get("authorization", "").encode(), self._expected):
            raise make_error("UNAUTHENTICATED", "this service is reached through the gateway only")
        tenant = metadata.get("x-treadle-tenant", "")
        scopes = metadata.get("x-treadle-scopes", "") if tenant else INTERNAL_SCOPE
        set_principal(Principal(tenant, frozenset(filter(None, scopes.split(",")))))


def _wrap(handler: Handler, details: grpc.HandlerCallDetails, interceptor: WrappingInterceptor) -> Handler:
    behaviour, make = _behaviour(handler)
    streams_out = handler.response_streaming
    parse = handler.request_deserializer or bytes
    read = _read_all if handler.request_streaming else _read

    async def unary(request: Any, context: Context) -> Any:
        async with _answering(context, details, interceptor) as call:
            await interceptor.before(details)
            interceptor.entered(details, call)
            return await behaviour(read(parse, request), context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        async with _answering(context, details, interceptor) as call:
            await interceptor.before(details)
            interceptor.entered(details, call)
            async for response in behaviour(read(parse, request), context):
                yield response

    return make(
        stream if streams_out else unary,
        # Parsed in here: gRPC's own answer to bytes that are no message looks like that of a server that broke.
        request_deserializer=None,
        response_serializer=handler.response_serializer,
    )


def _read(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        raise make_error("BAD_VALUE", "the bytes of the request are not those of its message") from error


async def _read_all(parse: Callable[[bytes], Any], frames: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for frame in frames:
        try:
            message = parse(frame)
        except DecodeError as error:
            raise make_error("BAD_FRAME", "the bytes of a frame are not those of its message") from error
        yield message


def _behaviour(handler: Handler) -> tuple[Any, Callable[..., Handler]]:
    """Returns the one of four behaviours that a handler has, and what makes a handler of that kind."""
    if handler.request_streaming and handler.response_streaming:
        return handler.stream_stream, cast(Any, grpc.stream_stream_rpc_method_handler)
    if handler.request_streaming:
        return handler.stream_unary, cast(Any, grpc.stream_unary_rpc_method_handler)
    if handler.response_streaming:
        return handler.unary_stream, cast(Any, grpc.unary_stream_rpc_method_handler)
    return handler.unary_unary, cast(Any, grpc.unary_unary_rpc_method_handler)


@asynccontextmanager
async def answering(
    call: RunningCall, method: str, fail: Callable[[TreadleError], Awaitable[None]]
) -> AsyncIterator[RunningCall]:
    """Has `fail` answer with whatever is raised inside, and with the reason why the call was ended from outside."""
    try:
        yield call
    except asyncio.CancelledError:
        if call.ended is None:
            raise
        await fail(call.ended)
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except TreadleError as error:
        await fail(error)
    except Exception as error:
        log.exception("call_failed", method=method, exc_info=error)
        await fail(make_error("INTERNAL", "the service failed at this call; its log has the reason"))


@asynccontextmanager
async def _answering(
    context: Context, details: grpc.HandlerCallDetails, interceptor: WrappingInterceptor
) -> AsyncIterator[RunningCall]:
    # The stub's protocol of a callback is a plain class.
    call = RunningCall(lambda callback: context.add_done_callback(lambda _: callback()))  # type: ignore[arg-type]
    said = dict(details.invocation_metadata) if interceptor.believes_callers else {}
    request_ids.begin(said.get(request_ids.HEADER, ""), details.method)
    with observing_call(details.method) as outcome, TRACING.call_span(details.method, str(said.get(HEADER, ""))):

        async def fail(error: TreadleError) -> None:
            outcome.failed(error.code.name, error.reason)
            await _abort(context, error)

        try:
            async with answering(call, details.method, fail):
                yield call
        except asyncio.CancelledError:
            outcome.failed("CANCELLED")
            raise
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            # Ours, or a status that the handler passed on.
            if not outcome.reason:
                outcome.failed(_name_of(context.code()))
            raise


def _name_of(code: object) -> str:
    """Returns the name of a status as a context has it: its number, which the stub does not know."""
    return next((known.name for known in grpc.StatusCode if code in (known, known.value[0])), "UNKNOWN")


async def _abort(context: Context, error: TreadleError) -> None:
    status = rpc_status.to_status(to_status(error, request_ids.current()))
    await context.abort(status.code, status.details, status.trailing_metadata)
