"""One sampler on several ranks: rank 0 serves and decides, the others decode the same with caches of their own.

Each rank has a whole Decoder over its part of the base. Before a step rank 0 tells the others which requests came and
went and gives them the adapters that they do not have; in the step all draw, and go on with what rank 0 drew. A rank
that is lost ends this process at once: torchrun starts the group again, and clients repeat their requests. Knows no
names of models.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import CacheCounts, DecodeEvent, SampleRequest
from treadle_engine.errors import EngineError
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.rank_group import Line, RankGroup
from treadle_engine.sampling import Drawn
from treadle_engine.shards import GroupLostError
from treadle_service import ranks
from treadle_service.logs import get_logger
from treadle_service.ranks import give_up

log = get_logger(__name__)

BASE_ONLY: Final = 0


@dataclass(frozen=True)
class _NewAdapter:
    """An adapter that requests will name by its number; its weights follow as a tensor."""

    number: int
    config: LoraConfig


@dataclass(frozen=True)
class _Add:
    """A request without its weights, and the number of its adapter, BASE_ONLY for none."""

    request: SampleRequest
    adapter: int


@dataclass(frozen=True)
class _Cancel:
    """A request is not wanted any more."""

    request: int


@dataclass(frozen=True)
class _Forget:
    """No request will name this adapter again."""

    number: int


@dataclass(frozen=True)
class _Round:
    """What happened since the last round, in order; `step` says whether to step then."""

    changes: tuple[_NewAdapter | _Add | _Cancel | _Forget, ...]
    step: bool


class GroupDecoder:
    """Rank 0's decoder, which the decoders of all other ranks go along with."""

    def __init__(self, decoder: Decoder, line: Line) -> None:
        """Lead `decoder`'s likes over `line`, by which its draws are settled as well."""
        self._decoder, self._line = decoder, line
        self._changes: list[_NewAdapter | _Add | _Cancel | _Forget] = []
        self._adapters: weakref.WeakKeyDictionary[AdapterWeights, int] = weakref.WeakKeyDictionary()
        self._new: list[AdapterWeights] = []
        self._unused: deque[int] = deque()
        self._count = BASE_ONLY

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self._decoder.has_work

    @property
    def num_active(self) -> int:
        """Sequences that have a place now."""
        return self._decoder.num_active

    @property
    def num_waiting(self) -> int:
        """Sequences that have none yet."""
        return self._decoder.num_waiting

    @property
    def num_steps(self) -> int:
        """Steps since start."""
        return self._decoder.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens drawn since start."""
        return self._decoder.num_tokens

    @property
    def owners(self) -> Mapping[str, int]:
        """Sequences that were drawn or read in the last step, by the owners of their requests."""
        return self._decoder.owners

    @property
    def cache_counts(self) -> CacheCounts:
        """What each rank holds of keys and values."""
        return self._decoder.cache_counts

    def add(self, request: SampleRequest) -> int:
        """Queue a request and return its number; EngineError when it is refused, which it then is on every rank."""
        number = BASE_ONLY if request.weights is None else self._number_of(request.weights)
        self._changes.append(_Add(replace(request, weights=None), number))
        return self._decoder.add(request)

    def cancel(self, number: int) -> None:
        """Forget a request and free what it holds; a finished or unknown one is no error."""
        self._changes.append(_Cancel(number))
        self._decoder.cancel(number)

    def step(self) -> list[DecodeEvent]:
        """Step on all ranks and return what came of it; ends the process when the ranks cannot go on together."""
        self._tell(step=True)
        try:
            return self._decoder.step()
        except Exception as error:  # noqa: BLE001 - whatever it was, the others have done something else
            give_up(error)

    def beat(self) -> None:
        """Let the other ranks hear that this one lives, when there is nothing to do."""
        self._tell(step=False)

    def end(self) -> None:
        """Tell the other ranks that nothing comes any more."""
        ranks.tell_end(self._line.share, GroupLostError)

    def _tell(self, *, step: bool) -> None:
        while self._unused:
            self._changes.append(_Forget(self._unused.popleft()))
        changes, self._changes = tuple(self._changes), []
        new, self._new = self._new, []
        try:
            self._line.share(_Round(changes, step))
            for weights in new:
                self._line.copy_(weights.flat)
        except GroupLostError as error:
            give_up(error)

    def _number_of(self, weights: AdapterWeights) -> int:
        """Return an adapter's number; the first time, have its weights sent before the next step."""
        known = self._adapters.get(weights)
        if known is not None:
            return known
        self._count += 1
        self._adapters[weights] = self._count
        self._changes.append(_NewAdapter(self._count, weights.config))
        self._new.append(weights)
        # From whatever thread lets go of it last.
        weakref.finalize(weights, self._unused.append, self._count)
        return self._count


class Leader(ranks.Leader[RankGroup]):
    """Rank 0's place in its group, and the decoder that leads the others'."""

    def __init__(self, timeout_seconds: float) -> None:
        """A rank that does not answer for so long is lost."""
        super().__init__(RankGroup, timeout_seconds)
        self._decoder: GroupDecoder | None = None

    def lead(self, decoder: Decoder) -> GroupDecoder:
        """Return the decoder of all ranks, given rank 0's."""
        self._decoder = GroupDecoder(decoder, self.group.main)
        return self._decoder

    async def beat_forever(self, call: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Let the others hear from time to time that rank 0 lives; `call` runs a function on the decoder's thread."""
        while self._decoder is not None:
            await asyncio.sleep(self.beat_seconds)
            await call(self._decoder.beat)

    def end(self) -> None:
        """Tell the others that nothing comes any more; on the decoder's thread."""
        if self._decoder is not None:
            self._decoder.end()
            RankGroup.leave()


class _Follower:
    """Another rank's decoder, and the adapters that rank 0 has named."""

    def __init__(self, base: DecodeBase, decoder: Decoder, line: Line) -> None:
        self._base, self._decoder, self._line = base, decoder, line
        self._adapters: dict[int, AdapterWeights] = {}

    def run(self) -> None:
        """Go along with rank 0 until it ends; ends the process when it is lost."""
        while True:
            try:
                told: _Round | None = self._line.share()
                if told is None:
                    return
                self._receive([change for change in told.changes if isinstance(change, _NewAdapter)])
                for change in told.changes:
                    self._apply(change)
                if told.step:
                    self._decoder.step()
            except Exception as error:  # noqa: BLE001 - whatever it was, rank 0 cannot go on without this one
                give_up(error)

    def _receive(self, new: list[_NewAdapter]) -> None:
        for adapter in new:
            weights = AdapterWeights(self._base, adapter.config)
            self._line.copy_(weights.flat)
            weights.refresh()
            self._adapters[adapter.number] = weights

    def _apply(self, change: _NewAdapter | _Add | _Cancel | _Forget) -> None:
        if isinstance(change, _Add):
            weights = self._adapters[change.adapter] if change.adapter != BASE_ONLY else None
            try:
                self._decoder.add(replace(change.request, weights=weights))
            except EngineError as error:
                log.debug("refused", reason=error.reason)  # as on rank 0, which answers it
        elif isinstance(change, _Cancel):
            self._decoder.cancel(change.request)
        elif isinstance(change, _Forget):
            del self._adapters[change.number]


def settle_draws(line: Line) -> Callable[[Drawn], Drawn]:
    """Return what makes all ranks go on with rank 0's tokens, and with its verdict on numbers that are none."""

    def settle(drawn: Drawn) -> Drawn:
        both_2N = torch.tensor([drawn.tokens, drawn.logprobs], dtype=torch.float64)
        line.copy_(both_2N)
        tokens, logprobs = both_2N.tolist()
        return Drawn([int(token) for token in tokens], logprobs, drawn.tempered_NV)

    return settle


def follow(load: Callable[[], tuple[RankGroup, tuple[DecodeBase, Decoder]]]) -> None:
    """Decodes what rank 0 says until it ends."""

    def decode(group: RankGroup, loaded: tuple[DecodeBase, Decoder]) -> None:
        with torch.no_grad():
            _Follower(*loaded, group.main).run()

    ranks.follow_rank_0(load, decode, GroupLostError)
