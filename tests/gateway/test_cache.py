"""The short memory of a gateway."""

import asyncio

import pytest

from treadle_gateway.cache import AsyncCache


class Source:
    """Counts how often it is asked; answers when let."""

    def __init__(self) -> None:
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()
        self.fail = False

    async def load(self) -> int:
        self.asked += 1
        asked = self.asked
        await self.open.wait()
        if self.fail:
            raise ValueError("no")
        return asked


async def test_an_answer_is_remembered_for_its_time_and_no_longer() -> None:
    """The clock is the caller's."""
    now = [0.0]
    cache, source = AsyncCache[str, int](2.0, clock=lambda: now[0]), Source()
    assert [await cache.get("k", source.load), await cache.get("k", source.load)] == [1, 1]
    now[0] = 2.0
    assert await cache.get("k", source.load) == 2


async def test_callers_who_ask_at_once_share_one_question() -> None:
    """A burst after expiry costs the store one call, and one caller's giving up does not hurt the rest."""
    cache, source = AsyncCache[str, int](2.0), Source()
    source.open.clear()
    first, second = (asyncio.create_task(cache.get("k", source.load)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    source.open.set()
    assert await second == 1
    assert source.asked == 1


async def test_a_failure_is_not_remembered() -> None:
    """The next caller asks again."""
    cache, source = AsyncCache[str, int](2.0), Source()
    source.fail = True
    with pytest.raises(ValueError, match="no"):
        await cache.get("k", source.load)
    source.fail = False
    assert await cache.get("k", source.load) == 2


async def test_it_is_bounded() -> None:
    """The oldest entry goes first."""
    cache, source = AsyncCache[int, int](100.0, max_entries=2), Source()
    for key in (1, 2, 3):
        await cache.get(key, source.load)
    await cache.get(3, source.load)
    assert source.asked == 3
    await cache.get(1, source.load)
    assert source.asked == 4


async def test_a_dropped_key_is_asked_again() -> None:
    """Dropping is how a moved run is found."""
    cache, source = AsyncCache[str, int](100.0), Source()
    await cache.get("k", source.load)
    cache.drop("k")
    assert await cache.get("k", source.load) == 2
