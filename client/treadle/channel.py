"""The SDK's connection: one private thread with an event loop, and two channels to one gateway.

Operations and control calls share one channel; files have the other, so that a download cannot delay a step.
Knows which failures are worth another try; knows nothing of what the calls mean.
"""

import asyncio
import logging
import random
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from grpc_status import rpc_status

from treadle.errors import LimitError, TreadleError, UnavailableError, from_rpc_error
from treadle.settings import ClientSettings

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]
# Requests and answers of any call; each caller knows its own types.
AnyCall = Callable[..., Awaitable[T]]

# The receiver's look-ahead decides throughput on long links; keepalive finds a peer that vanished without a FIN;
# a pool of its own keeps the two channels on two connections.
CHANNEL_OPTIONS: Final = (
    ("grpc.http2.lookahead_bytes", 16 * 2**20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: how long connecting may take. Shorter than a slow link needs, no connection would ever come up.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Without a rich status these come from a connection that broke, not from the service.
_BROKEN: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED}
)
_log = logging.getLogger(__name__)


class Backoff:
    """Waiting times between tries: 0.05 s, doubling to 5 s, each shortened by up to half at random."""

    def __init__(self, first_seconds: float = 0.05, longest_seconds: float = 5.0) -> None:
        self._first, self._longest = first_seconds, longest_seconds
        self._tries = 0
        # Its own: a user's seeded loop must not draw other numbers because a connection broke.
        self._random = random.Random()

    def next_seconds(self) -> float:
        """Returns the next waiting time in seconds."""
        limit = min(self._longest, self._first * 2.0**self._tries)
        self._tries = min(self._tries + 1, 30)
        return limit * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Starts again at the shortest wait."""
        self._tries = 0


def failure_of(error: grpc.aio.AioRpcError) -> tuple[TreadleError, bool]:
    """Returns the exception for a failed call and whether another try may help."""
    failure = from_rpc_error(error)
    if rpc_status.from_call(error) is None and error.code() in _BROKEN:
        return UnavailableError(f"the connection to the service broke: {error.details()}"), True
    return failure, failure.retryable


class Transport:
    """Runs coroutines on the SDK's thread and makes calls with retries; used from any thread."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self.client_id = uuid.uuid4().hex
        self._reached = False
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_handle_loop_exception)
        self._thread = threading.Thread(target=self._run_loop, name="treadle", daemon=True)
        self._thread.start()
        self.ops_channel, self.blobs_channel = self.wait(self._open_channels())

    @property
    def metadata(self) -> Metadata:
        """What every call carries."""
        return (("authorization", f"Bearer {self.settings.api_key}"),) if self.settings.api_key else ()

    @property
    def on_own_thread(self) -> bool:
        """Tells whether the caller is the SDK's thread, which must never wait for itself."""
        return threading.current_thread() is self._thread

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts a coroutine on the SDK's thread."""
        if self._closed:
            work.close()
            raise UnavailableError("the client has been closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the SDK's thread and returns its result."""
        return self.start(work).result()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Calls `call` on the SDK's thread, in order of these calls."""
        self._loop.call_soon_threadsafe(call)

    async def retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Makes an idempotent call until it works, fails for good, or patience ends; raises TreadleError."""
        backoff, began = Backoff(), self._loop.time()
        while True:
            try:
                answer = await attempt()
            except grpc.aio.AioRpcError as error:
                failure, again = failure_of(error)
                again = again and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                self._reached = True
                return answer
            patience = self.settings.retry_seconds if self._reached else self.settings.first_contact_seconds
            if isinstance(failure, LimitError):
                # The service is there and says when to come again.
                patience = self.settings.give_up_after_seconds
            if not again or self._loop.time() - began > patience:
                raise self._explained(failure)
            _log.info("call failed, trying again: %s", failure)
            await asyncio.sleep(max(backoff.next_seconds(), failure.retry_after_seconds or 0.0))

    def call(self, method: AnyCall[T], request: object, *, again: bool = True) -> T:
        """Makes a control call on the SDK's thread, repeated on passing trouble if `again`; returns its answer."""
        return self.wait(self.call_async(method, request, again=again))

    async def call_async(
        self,
        method: AnyCall[T],
        request: object,
        *,
        again: bool = True,
        seconds: float | None = None,
        metadata: Metadata = (),
    ) -> T:
        """The same as `call`, for coroutines on the SDK's thread."""
        seconds = seconds or self.settings.call_seconds

        async def attempt() -> T:
            return await method(request, timeout=seconds, metadata=(*self.metadata, *metadata))

        if again:
            return await self.retried(attempt)
        try:
            return await attempt()
        except grpc.aio.AioRpcError as error:
            raise self._explained(failure_of(error)[0]) from None

    def mark_reached(self) -> None:
        """Notes that the service has answered, so that later trouble is worth more patience."""
        self._reached = True

    def close(self) -> None:
        """Closes the channels and ends the thread; what still waits fails."""
        if self._closed:
            return
        closing = self.start(self._close_channels())
        self._closed = True
        closing.result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _explained(self, failure: TreadleError) -> TreadleError:
        if self._reached or not isinstance(failure, UnavailableError):
            return failure
        hint = f"cannot reach {self.settings.address}: {failure.message}; is the gateway running there?"
        return UnavailableError(hint, failure.reason)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _open_channels(self) -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
        # grpc.aio binds a channel to the loop that it is made in.
        return self._open_channel(), self._open_channel()

    def _open_channel(self) -> grpc.aio.Channel:
        scheme, _, target = self.settings.address.rpartition("://")
        if scheme == "https":
            ca = Path(self.settings.ca_file).read_bytes() if self.settings.ca_file else None
            return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(ca), options=CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)

    async def _close_channels(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(self.ops_channel.close(), self.blobs_channel.close())


def _handle_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # When several loops of a process use grpc.aio, each is woken for the others' events and finds nothing to read.
    if isinstance(context.get("exception"), BlockingIOError):
        return
    loop.default_exception_handler(context)
