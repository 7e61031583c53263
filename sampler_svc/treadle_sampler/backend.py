"""What the service needs of an engine; `treadle_engine.decode.Decoder` is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from treadle_engine.decode_requests import CacheCounts, DecodeEvent, SampleRequest


class SamplerBackend(Protocol):
    """An engine that many requests share. One thread makes all calls."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...

    @property
    def num_active(self) -> int:
        """Sequences that have a place now."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sequences that have none yet."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps since start."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens drawn since start."""
        ...

    @property
    def owners(self) -> Mapping[str, int]:
        """Sequences that were drawn or read in the last step, by the owners of their requests."""
        ...

    @property
    def cache_counts(self) -> CacheCounts:
        """What is held of keys and values; zeros where the engine does not say."""
        ...

    def add(self, request: SampleRequest) -> int:
        """Queue a request and return its number; EngineError when it is refused."""
        ...

    def cancel(self, number: int) -> None:
        """Forget a request and free what it holds; a finished or unknown one is no error."""
        ...

    def step(self) -> list[DecodeEvent]:
        """Do some work and return what came of it, in order for each request."""
        ...
