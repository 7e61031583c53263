"""The calls that this gateway answers now: bounded in number, and ended when their key ends.

A limit is per gateway: it protects this process, and keeps one tenant from taking all of it. Knows nothing of what
the calls do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from treadle.errors import make_error
from treadle_service.interceptors import RunningCall
from treadle_service.principal import Principal

RETRY_SECONDS: Final = 1.0
CallKind = Literal["call", "stream", "request"]
"""A gRPC call, a stream of operations, or an HTTP request: they are counted apart."""
_NAMES: Final[dict[CallKind, str]] = {"call": "calls", "stream": "operation streams", "request": "HTTP requests"}


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How many calls may be open at once."""

    total: int
    calls_per_tenant: int
    streams_per_tenant: int
    requests_per_tenant: int

    def of(self, kind: CallKind) -> int:
        """Returns how many of a kind one tenant may have open."""
        limits = {"call": self.calls_per_tenant, "stream": self.streams_per_tenant, "request": self.requests_per_tenant}
        return limits[kind]


class LiveCalls:
    """Counts calls in and out; single-threaded, the event loop's."""

    def __init__(self, limits: CallLimits) -> None:
        self._limits = limits
        self._num_admitting = 0
        self._calls: dict[RunningCall, Principal] = {}
        self._per_tenant: Counter[tuple[str, CallKind]] = Counter()

    def __len__(self) -> int:
        return len(self._calls) + self._num_admitting

    @contextmanager
    def admitting(self) -> Iterator[None]:
        """Counts a call whose caller is not known yet; QUEUE_FULL when the gateway has all that it can hold."""
        if len(self) >= self._limits.total:
            raise make_error("QUEUE_FULL", f"this gateway answers {len(self)} calls already; try again", RETRY_SECONDS)
        self._num_admitting += 1
        try:
            yield
        finally:
            self._num_admitting -= 1

    def enter(self, call: RunningCall, principal: Principal, kind: CallKind) -> None:
        """Counts a call in until it is done; QUEUE_FULL when its tenant has as many as one may have."""
        limit, slot = self._limits.of(kind), (principal.tenant, kind)
        if self._per_tenant[slot] >= limit:
            what = f"{limit} {_NAMES[kind]} open at this gateway"
            raise make_error("QUEUE_FULL", f"you have {what}; try again", RETRY_SECONDS)
        self._per_tenant[slot] += 1
        self._calls[call] = principal
        call.on_done(self._leaver(call, slot))

    def key_ids(self) -> list[str]:
        """Returns the keys under which calls are open."""
        return sorted({principal.key_id for principal in self._calls.values()})

    def end_keys(self, key_ids: Collection[str]) -> None:
        """Ends the calls that were made with these keys."""
        for call, principal in list(self._calls.items()):
            if principal.key_id in key_ids:
                call.end(make_error("UNAUTHENTICATED", "the key of this call was revoked or has expired"))

    def _leaver(self, call: RunningCall, slot: tuple[str, CallKind]) -> Callable[[], None]:
        def leave() -> None:
            if self._calls.pop(call, None) is not None:
                self._per_tenant[slot] -= 1
                if not self._per_tenant[slot]:
                    del self._per_tenant[slot]

        return leave
