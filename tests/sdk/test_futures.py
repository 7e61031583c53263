"""Handles can be waited for from threads and loops, many at once, and giving up a wait harms nobody."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from treadle.errors import BadBatchError
from treadle.futures import Handle


def doubled() -> tuple[Future[int], Handle[int], list[int]]:
    """A future, a handle on its double, and the list of conversions made."""
    future: Future[int] = Future()
    calls: list[int] = []

    def convert(value: int) -> int:
        calls.append(value)
        return 2 * value

    return future, Handle(future, convert), calls


def test_threads_and_loops_get_the_same_result() -> None:
    """Everybody who waits gets it; it is converted once."""
    future, handle, calls = doubled()
    results: list[int] = []

    async def wait_twice() -> None:
        results.extend(await asyncio.gather(handle.result_async(), handle.result_async()))

    threads = [threading.Thread(target=lambda: results.append(handle.result())) for _ in range(3)]
    threads.append(threading.Thread(target=lambda: asyncio.run(wait_twice())))
    for thread in threads:
        thread.start()
    future.set_result(21)
    for thread in threads:
        thread.join(10)
    assert results == [42] * 5
    assert calls == [21]


async def test_giving_up_a_wait_leaves_the_operation_alone() -> None:
    """A cancelled or timed-out wait does not cancel what others wait for."""
    future, handle, _ = doubled()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(handle.result_async(), 0.01)
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.01)
    assert not future.cancelled()
    future.set_result(1)
    assert await handle == 2
    assert handle.done()


def test_errors_are_raised_wherever_somebody_waits() -> None:
    """The operation's error comes out of `result`, `await` and `exception`."""
    future, handle, _ = doubled()
    future.set_exception(BadBatchError("no"))
    seen: list[Handle[int]] = []
    handle.add_done_callback(seen.append)
    assert seen == [handle]
    with pytest.raises(BadBatchError):
        handle.result()
    with pytest.raises(BadBatchError):
        asyncio.run(handle.result_async())
    assert isinstance(handle.exception(), BadBatchError)


def test_a_loop_that_closed_while_waiting_does_no_harm() -> None:
    """The result arrives although a former waiter's loop is gone."""
    future, handle, _ = doubled()

    async def wait_a_little() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.result_async(), 0.01)

    asyncio.run(wait_a_little())
    future.set_result(3)
    assert handle.result() == 6
