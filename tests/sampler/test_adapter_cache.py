"""The cache of revisions: one load for many, eviction, deletion, a store that is away."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from treadle.errors import TreadleError, make_error
from treadle_sampler.adapter_cache import AdapterCache, Found


@dataclass(frozen=True)
class Weights:
    """A revision of 10 bytes."""

    name: str
    num_bytes: int = 10


@dataclass
class Shelf:
    """A source whose revisions can change, vanish and be out of reach."""

    versions: dict[str, str]
    reachable: bool = True
    loads: list[str] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def lookup(self, name: str) -> Found:
        """Return what is under the name, or raise as the store does."""
        self.lookups.append(name)
        if not self.reachable:
            raise make_error("UNAVAILABLE", "the store is away")
        if name not in self.versions:
            raise make_error("MODEL_NOT_FOUND", "there is no such model")
        return self.found(name)

    def found(self, name: str) -> Found:
        """Return what is under the name."""
        return Found(name, (("weights", self.versions[name]),))

    async def load(self, found: Found) -> Weights:
        """Return new weights once the gate is open."""
        name = found.name
        self.loads.append(name)
        if self.gate is not None:
            await self.gate.wait()
        if self.versions.get(name) == "broken":
            raise make_error("BAD_ADAPTER_FILE", "broken")
        return Weights(name)


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def make_cache(
    shelf: Shelf, clock: Clock, entries: int = 2, size: int = 1000, unused: int = 1000
) -> AdapterCache[Weights]:
    """Return an empty cache."""
    return AdapterCache(shelf, clock, max_entries=entries, max_bytes=size, max_unused_bytes=unused, lookup_seconds=10.0)


async def use(cache: AdapterCache[Weights], name: str) -> Weights:
    """Lease and give back."""
    async with cache.lease(name) as weights:
        return weights


async def test_one_load_serves_all_who_wait() -> None:
    """Five callers at once cause one load; one that goes away does not break it for the others."""
    shelf = Shelf({"a": "1"}, gate=asyncio.Event())
    cache = make_cache(shelf, Clock())
    calls = [asyncio.create_task(use(cache, "a")) for _ in range(5)]
    await asyncio.sleep(0.01)
    calls[0].cancel()
    await asyncio.sleep(0.01)
    assert shelf.gate is not None
    shelf.gate.set()
    results = await asyncio.gather(*calls[1:])
    assert len({id(weights) for weights in results}) == 1
    assert shelf.loads == ["a"]


async def test_the_least_recently_used_goes_first_but_never_in_use() -> None:
    """Eviction by count spares what is leased and what was used last."""
    shelf = Shelf(dict.fromkeys("abcd", "1"))
    cache = make_cache(shelf, Clock())
    async with cache.lease("a"):
        for name in "bcd":
            await use(cache, name)
        assert cache.names == ["a", "d"]
        async with cache.lease("b"), cache.lease("c"):
            assert {"a", "b", "c"} <= set(cache.names)
    await use(cache, "c")
    assert len(cache.names) == 2
    assert "c" in cache.names


async def test_bytes_are_bounded_too() -> None:
    """Ten bytes each, twenty-five allowed: two stay."""
    cache = make_cache(Shelf(dict.fromkeys("abcd", "1")), Clock(), entries=10, size=25)
    for name in "abcd":
        await use(cache, name)
    assert cache.names == ["c", "d"]
    assert cache.num_bytes == 20


async def test_a_failed_load_is_tried_again() -> None:
    """Everybody who waited gets the error; the next caller may succeed."""
    shelf = Shelf({"a": "broken"})
    cache = make_cache(shelf, Clock())
    for result in await asyncio.gather(use(cache, "a"), use(cache, "a"), return_exceptions=True):
        assert isinstance(result, TreadleError)
    shelf.versions["a"] = "1"
    assert (await use(cache, "a")).name == "a"


async def test_deleted_and_replaced_revisions_do_not_live_on() -> None:
    """After lookup_seconds the store is asked again; new content is loaded, a deleted name is not found."""
    shelf, clock = Shelf({"a": "1"}), Clock()
    cache = make_cache(shelf, clock)
    first = await use(cache, "a")
    assert await use(cache, "a") is first
    clock.now = 11.0
    shelf.versions["a"] = "2"
    second = await use(cache, "a")
    assert second is not first
    clock.now = 22.0
    del shelf.versions["a"]
    with pytest.raises(TreadleError, match="MODEL_NOT_FOUND"):
        await use(cache, "a")
    assert cache.names == []


async def test_cached_revisions_outlive_the_store() -> None:
    """While the store is away, what is here serves on and what is not says that it is unavailable."""
    shelf, clock = Shelf({"a": "1", "b": "1"}), Clock()
    cache = make_cache(shelf, clock)
    first = await use(cache, "a")
    shelf.reachable, clock.now = False, 100.0
    assert await use(cache, "a") is first
    with pytest.raises(TreadleError, match="UNAVAILABLE"):
        await use(cache, "b")


async def test_what_was_fetched_ahead_is_served_without_a_question() -> None:
    """One load, no lookup; a second piece of news of the same revision changes nothing."""
    shelf = Shelf({"a": "1"})
    cache = make_cache(shelf, Clock())
    await cache.prefetch(shelf.found("a"))
    await cache.prefetch(shelf.found("a"))
    assert (await use(cache, "a")).name == "a"
    assert (shelf.loads, shelf.lookups) == (["a"], [])


async def test_a_request_joins_a_fetch_that_is_under_way() -> None:
    """Publish and request at the same moment: one load, and the request gets it."""
    shelf = Shelf({"a": "1"}, gate=asyncio.Event())
    cache = make_cache(shelf, Clock())
    ahead = asyncio.create_task(cache.prefetch(shelf.found("a")))
    await asyncio.sleep(0.01)
    request = asyncio.create_task(use(cache, "a"))
    await asyncio.sleep(0.01)
    assert shelf.gate is not None
    shelf.gate.set()
    assert (await request).name == "a"
    await ahead
    assert shelf.loads == ["a"]


async def test_what_is_broken_fails_those_who_ask_for_it_and_nobody_else() -> None:
    """Fetching ahead swallows the error and keeps nothing; whoever asks gets it."""
    shelf = Shelf({"a": "1", "bad": "broken"})
    cache = make_cache(shelf, Clock())
    await use(cache, "a")
    await cache.prefetch(shelf.found("bad"))
    assert cache.names == ["a"]
    with pytest.raises(TreadleError, match="BAD_ADAPTER_FILE"):
        await use(cache, "bad")


async def test_what_nobody_asked_for_is_bounded_by_itself() -> None:
    """Ten bytes each, twenty-five for the unused ones: the oldest go, what was used stays, the newest stays always."""
    shelf = Shelf(dict.fromkeys("abcdef", "1"))
    cache = make_cache(shelf, Clock(), entries=10, unused=25)
    await use(cache, "a")
    for name in "bcdef":
        await cache.prefetch(shelf.found(name))
    assert cache.names == ["a", "e", "f"]
    small = make_cache(shelf, Clock(), entries=10, unused=0)
    await small.prefetch(shelf.found("b"))
    assert small.names == ["b"]


async def test_a_dropped_revision_serves_those_who_hold_it() -> None:
    """News of a deletion in mid-request: the holder goes on with the same weights, the next request finds nothing."""
    shelf = Shelf({"a": "1"})
    cache = make_cache(shelf, Clock())
    async with cache.lease("a") as weights:
        del shelf.versions["a"]
        cache.drop("a")
        assert weights.name == "a"
        assert cache.names == []
        assert cache.num_bytes == 0
    with pytest.raises(TreadleError, match="MODEL_NOT_FOUND"):
        await use(cache, "a")


async def test_a_name_with_new_content_leaves_holders_with_the_old_one() -> None:
    """Deleted and saved anew under one name while in use: each request keeps exactly what it began with."""
    shelf = Shelf({"a": "1"})
    cache = make_cache(shelf, Clock())
    async with cache.lease("a") as old:
        shelf.versions["a"] = "2"
        await cache.prefetch(shelf.found("a"))
        async with cache.lease("a") as new:
            assert new is not old
    assert cache.num_bytes == 10


async def test_a_watched_cache_looks_up_after_serving() -> None:
    """With news coming in the periodic look does not delay a request; doubt makes it come first again."""
    shelf, clock = Shelf({"a": "1"}), Clock()
    cache = make_cache(shelf, clock)
    cache.watched = True
    await use(cache, "a")
    clock.now, shelf.versions = 11.0, {}
    assert (await use(cache, "a")).name == "a"
    await asyncio.sleep(0.01)
    assert cache.names == []
    shelf.versions = {"a": "1"}
    await use(cache, "a")
    cache.doubt()
    shelf.versions = {}
    with pytest.raises(TreadleError, match="MODEL_NOT_FOUND"):
        await use(cache, "a")
