"""The one thread that owns torch: it steps the decoder for as long as there is work and sleeps otherwise.

The event loop hands it requests and gets back queues of events; it never waits for torch. Knows nothing of gRPC,
names or tenants.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from treadle.errors import make_error
from treadle_engine.base_model import KnownBase
from treadle_engine.decode_requests import CacheCounts, DecodeEvent, FailedEvent, SampleRequest
from treadle_engine.errors import EngineError
from treadle_sampler.backend import SamplerBackend
from treadle_sampler.trace import DecodeStep, StepTrace
from treadle_service.logs import get_logger

T = TypeVar("T")
Command = Callable[[], None]
log = get_logger(__name__)


@dataclass(frozen=True)
class EngineLoad:
    """What the decoder is doing, as of its last step or request."""

    num_active: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    cache: CacheCounts = field(default_factory=CacheCounts)


@dataclass(eq=False)
class _Subscription:
    """Where the events of one request go."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[DecodeEvent] = field(default_factory=asyncio.Queue)


class EngineLoop:
    """A decoder on a thread of its own."""

    def __init__(self, max_requests: int) -> None:
        """Take at most `max_requests` at once; `start` begins."""
        self.load = EngineLoad()
        self.num_requests = 0
        self.trace = StepTrace()
        self._max_requests = max_requests
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._decoder: SamplerBackend | None = None
        self._subscriptions: dict[int, _Subscription] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sampler-engine", daemon=True)

    async def start(self, load: Callable[[], tuple[KnownBase, SamplerBackend]]) -> KnownBase:
        """Start the thread, load the base and its decoder on it, and return the base."""
        self._thread.start()

        def make() -> KnownBase:
            base, self._decoder = load()
            return base

        return await self.call(make)

    async def stop(self, last: Callable[[], None] | None = None) -> None:
        """End the thread after the step in progress, and after `last`; requests that run then get no more events."""
        if self._thread.is_alive():
            if last is not None:
                await self.call(last)
            self._commands.put(self._stop)
            await asyncio.to_thread(self._thread.join)

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run a function on the thread, between two steps, and return what it returns or raises."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def command() -> None:
            try:
                value = function()
            except Exception as error:  # noqa: BLE001 - the thread's outermost guard: whoever waits gets it
                future.set_exception(error)
            else:
                future.set_result(value)

        self._commands.put(command)
        # Shielded: a caller that goes away does not keep the function from running.
        return asyncio.shield(asyncio.wrap_future(future))

    async def sample(self, request: SampleRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Yield the events of a request as they come; leaving early frees its places at the next step.

        Raises QUEUE_FULL when too many requests are here, EngineError when the request is refused.
        """
        if self.num_requests >= self._max_requests:
            raise make_error("QUEUE_FULL", f"{self._max_requests} requests are running or waiting; try again", 1.0)
        self.num_requests += 1
        subscription = _Subscription(asyncio.get_running_loop())
        numbers: list[int] = []
        try:
            await self.call(lambda: self._add(request, subscription, numbers))
            while True:
                yield await subscription.events.get()
        finally:
            self.num_requests -= 1
            self._commands.put(lambda: self._cancel(numbers))

    def _add(self, request: SampleRequest, subscription: _Subscription, numbers: list[int]) -> None:
        numbers.append(self._ready.add(request))
        self._subscriptions[numbers[0]] = subscription

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            self._subscriptions.pop(number, None)
            self._ready.cancel(number)

    def _stop(self) -> None:
        self._stopping = True

    @property
    def _ready(self) -> SamplerBackend:
        if self._decoder is None:
            raise EngineError("UNAVAILABLE", "the base is still loading")
        return self._decoder

    def _run(self) -> None:
        while not self._stopping:
            busy = self._decoder is not None and self._decoder.has_work
            if not busy or not self._commands.empty():
                self._commands.get()()
                self._report()
            elif self._decoder is not None:
                self._step(self._decoder)

    def _step(self, decoder: SamplerBackend) -> None:
        started, began = time.time(), time.monotonic()
        num_sequences, num_tokens = decoder.num_active, decoder.num_tokens
        try:
            events = decoder.step()
        except Exception as error:  # The thread's outermost guard: what breaks a step must not end the thread.
            log.exception("step_failed", exc_info=error)
            events = []
            for number in list(self._subscriptions):
                decoder.cancel(number)
                events.append(FailedEvent(number, EngineError("INTERNAL", "a decoding step failed; its log says why")))
        took = time.monotonic() - began
        self.trace.add(DecodeStep(started, took, num_sequences, decoder.num_tokens - num_tokens, decoder.owners))
        self._report()
        self._deliver(events)

    def _report(self) -> None:
        if (decoder := self._decoder) is not None:
            self.load = EngineLoad(
                decoder.num_active, decoder.num_waiting, decoder.num_steps, decoder.num_tokens, decoder.cache_counts
            )

    def _deliver(self, events: list[DecodeEvent]) -> None:
        """Hand the events over with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Subscription, DecodeEvent]]] = {}
        for event in events:
            subscription = self._subscriptions.get(event.request)
            if subscription is not None:
                by_loop.setdefault(subscription.loop, []).append((subscription, event))
        for loop, batch in by_loop.items():
            loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: list[tuple[_Subscription, DecodeEvent]]) -> None:
    for subscription, event in batch:
        subscription.events.put_nowait(event)
