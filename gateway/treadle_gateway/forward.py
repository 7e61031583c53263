"""Passes calls on byte for byte, with backpressure, and answers with the upstream's own statuses.

A frame is read from one side only after the one before has been written to the other. Knows nothing of what the
bytes mean; who gets them is decided by the caller. Client metadata is never passed on: what a worker believes about
the caller comes from the gateway alone.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc

from treadle.errors import TreadleError, from_rpc_error, make_error
from treadle_gateway.op_spans import StreamSpans
from treadle_service.channels import Metadata, open_channel
from treadle_service.tls import ClientTls

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Call = grpc.aio.StreamStreamCall[bytes, bytes]

LONGEST_CALL_SECONDS: Final = 900.0
"""How long a call other than a stream of operations may take when its caller sets no deadline."""
_STATUS_DETAILS: Final = "grpc-status-details-bin"
# Codes with which gRPC itself reports that the peer went away in the middle of a call.
_LOST_CODES: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call goes."""

    address: str
    metadata: Metadata
    # What the caller is told when the upstream vanishes; also drops what routing remembered.
    lost: Callable[[], TreadleError]
    # Called when the upstream refuses, with the refusal; routing may have been wrong.
    refused: Callable[[TreadleError], None] = lambda _: None
    # The run that a stream of operations is about.
    run: str = ""


class Upstreams:
    """One channel per upstream address, opened on first use, and how many calls each carries."""

    def __init__(self, tls: ClientTls | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.in_flight: Counter[str] = Counter()

    def channel(self, address: str) -> grpc.aio.Channel:
        """Returns the channel to `address`."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, self._tls)
        return channel

    @contextlib.contextmanager
    def use(self, address: str) -> Iterator[grpc.aio.Channel]:
        """Gives the channel to `address` and counts a call on it meanwhile."""
        self.in_flight[address] += 1
        try:
            yield self.channel(address)
        finally:
            self.in_flight[address] -= 1

    async def retain(self, addresses: frozenset[str]) -> None:
        """Closes idle channels to addresses that are no longer anybody's."""
        for address in [a for a in self._channels if a not in addresses and not self.in_flight[a]]:
            del self.in_flight[address]
            await self._channels.pop(address).close()

    async def close(self) -> None:
        """Closes all channels."""
        while self._channels:
            await self._channels.popitem()[1].close()


class Forwarder:
    """Forwards calls of the four kinds; cuts off streams when the gateway drains."""

    def __init__(self, upstreams: Upstreams) -> None:
        self.upstreams = upstreams
        self.num_request_bytes, self.num_response_bytes = 0, 0
        self._streams: dict[Call, Target] = {}
        self._cut: set[Call] = set()
        self._ending = False
        self._no_streams = asyncio.Event()
        self._no_streams.set()

    async def unary(self, method: str, request: bytes, context: "Context", target: Target) -> bytes:
        """Returns the upstream's answer, or aborts with its status."""
        with self.upstreams.use(target.address) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            try:
                return await call(request, metadata=target.metadata, timeout=_time_left(context))
            except grpc.aio.AioRpcError as error:
                await _relay(context, error, target)

    async def server_stream(
        self, method: str, request: bytes, context: "Context", target: Target
    ) -> AsyncGenerator[bytes, None]:
        """Yields the upstream's answers to one request."""
        with self.upstreams.use(target.address) as channel:
            start: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
            call = start(request, metadata=target.metadata, timeout=_time_left(context))
            try:
                async for response in call:
                    yield response
            except grpc.aio.AioRpcError as error:
                await _relay(context, error, target)
            finally:
                call.cancel()

    async def client_stream(
        self, method: str, requests: AsyncIterator[bytes], context: "Context", target: Target
    ) -> bytes:
        """Sends the caller's frames and returns the upstream's one answer."""
        with self.upstreams.use(target.address) as channel:
            start: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(method)
            call = start(requests, metadata=target.metadata, timeout=_time_left(context))
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                await _relay(context, error, target)
            finally:
                call.cancel()

    async def stream(
        self, method: str, requests: AsyncIterator[bytes], context: "Context", target: Target
    ) -> AsyncGenerator[bytes, None]:
        """Joins the caller's stream to the upstream's until either ends; raises DRAINING when cut off."""
        if self._ending:
            raise _draining()
        with self.upstreams.use(target.address) as channel:
            start: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
            spans = StreamSpans(target.run)
            call = start(self._counted(requests, spans), metadata=target.metadata)
            self._enter(call, target)

            def on_done(_: "Context") -> None:
                # A caller who vanishes while a frame is being written to it leaves this generator suspended.
                call.cancel()

            context.add_done_callback(on_done)  # type: ignore[arg-type]  # The stub's protocol is a plain class.
            try:
                async for response in call:
                    self.num_response_bytes += len(response)
                    spans.response(response)
                    yield response
            except grpc.aio.AioRpcError as error:
                await _relay(context, error, target)
            except asyncio.CancelledError:
                if call in self._cut:
                    raise target.lost() from None
                if not self._ending:
                    raise
                raise _draining() from None
            finally:
                call.cancel()
                self._leave(call)

    @property
    def num_streams(self) -> int:
        """Streams that are joined now."""
        return len(self._streams)

    async def _counted(self, requests: AsyncIterator[bytes], spans: StreamSpans) -> AsyncIterator[bytes]:
        async for request in requests:
            self.num_request_bytes += len(request)
            spans.request(request)
            yield request

    def streams_outside(self, addresses: frozenset[str]) -> list[Target]:
        """Returns the targets of streams to others than these addresses."""
        return [target for target in self._streams.values() if target.address not in addresses]

    def cut(self, target: Target) -> None:
        """Ends the stream to a target as if the target had gone."""
        for call in [call for call, its in self._streams.items() if its is target]:
            self._cut.add(call)
            call.cancel()

    async def end_streams(self, grace_seconds: float) -> None:
        """Waits for the streams to end by themselves, then ends the rest with DRAINING."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._no_streams.wait()
        self._ending = True
        for call in list(self._streams):
            call.cancel()

    def _enter(self, call: "Call", target: Target) -> None:
        self._streams[call] = target
        self._no_streams.clear()

    def _leave(self, call: "Call") -> None:
        self._streams.pop(call, None)
        self._cut.discard(call)
        if not self._streams:
            self._no_streams.set()


def _time_left(context: "Context") -> float:
    """Returns the caller's deadline in seconds from now, at most LONGEST_CALL_SECONDS."""
    left = context.time_remaining()
    return LONGEST_CALL_SECONDS if left is None else min(left, LONGEST_CALL_SECONDS)


def _draining() -> TreadleError:
    return make_error("DRAINING", "this gateway is going; connect again and resume", 0.1)


async def _relay(context: "Context", error: grpc.aio.AioRpcError, target: Target) -> NoReturn:
    """Ends the call with the upstream's status unchanged, or with `target.lost()` when gRPC made the status."""
    # Any: metadata values are text or, for -bin keys, bytes.
    trailers: Any = error.trailing_metadata() or ()
    details = tuple((key, value) for key, value in trailers if key == _STATUS_DETAILS)
    if not details and error.code() in _LOST_CODES:
        raise target.lost() from error
    target.refused(from_rpc_error(error))
    await context.abort(error.code(), error.details() or "", details)
