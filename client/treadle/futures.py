"""Handles: what a call returns at once, for a result that comes later.

A handle can be waited for from any thread and awaited in any event loop, as often as wanted. Giving up the wait
never cancels the operation. Knows nothing of operations.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Handle(Generic[T]):
    """A result that comes later: `.result()` from any thread, `await` in any event loop.

    `convert` makes the result of what the future yields; once, in the first thread that asks, so that decoding does
    not hold up the thread that receives.
    """

    def __init__(self, future: "Future[S]", convert: Callable[[S], T]) -> None:
        # The future's own type matters to `convert` alone.
        self._future: Future[Any] = future
        self._convert: Callable[[Any], T] = convert
        self._lock = threading.Lock()
        self._converted: list[T] = []

    def result(self, timeout: float | None = None) -> T:
        """Waits for the result, at most `timeout` seconds; raises TimeoutError, or the operation's error."""
        raw = self._future.result(timeout)
        with self._lock:
            if not self._converted:
                self._converted.append(self._convert(raw))
            return self._converted[0]

    async def result_async(self) -> T:
        """Waits for the result without blocking the event loop."""
        return await self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits like `result` and returns the operation's error, or None when it went well."""
        return self._future.exception(timeout)

    def done(self) -> bool:
        """Tells whether the result or the error is there."""
        return self._future.done()

    def add_done_callback(self, call: Callable[["Handle[T]"], object]) -> None:
        """Calls `call` with this handle when it is done; on the SDK's own thread, so it must not block."""
        self._future.add_done_callback(lambda _: call(self))

    def __await__(self) -> Generator[object, None, T]:
        # Not asyncio.wrap_future: that one cancels the shared future when a single waiter is cancelled.
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def wake_from_elsewhere(_: "Future[Any]") -> None:
            # The waiter's loop may have been closed since; then nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        self._future.add_done_callback(wake_from_elsewhere)
        yield from waiter
        return self.result()
