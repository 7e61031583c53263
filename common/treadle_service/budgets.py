"""What tenants may use of one worker, as far as this worker knows: checked before work is accepted. Pure but the clock.

The store keeps the truth and tells it with every charge; between two charges the copy here refills at the tenant's
rate, and what was accepted but is not charged yet counts as used. A tenant is let in while it has any credit, whatever
the cost of what it brings: it pays afterwards. Knows nothing of operations, requests and gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from treadle.errors import make_error
from treadle.internal.v1 import usage_pb2
from treadle_service.metrics import QUOTA_REFUSALS

LONGEST_WAIT_SECONDS: Final = 30.0
"""Nobody is told to wait for longer: a quota may be raised meanwhile."""
UNFINISHED_WAIT_SECONDS: Final = 0.5
KEPT_SECONDS: Final = 600.0


@dataclass(slots=True)
class _Account:
    """One tenant, on the worker's clock."""

    tokens_per_minute: int = 0
    paid_at: float = 0.0
    max_unfinished: int = 0
    learned_at: float = float("-inf")
    num_uncharged: int = 0
    """Tokens that were accepted and are in no answer of the store yet."""
    num_unfinished: int = 0


class TenantBudgets:
    """The budgets of all tenants that this worker has met."""

    def __init__(self, kind: Literal["training", "sampling"], clock: Callable[[], float] = time.monotonic) -> None:
        self._kind, self._clock = kind, clock
        self._accounts: dict[str, _Account] = {}
        self._refused: set[str] = set()

    def learn(self, budgets: Iterable[usage_pb2.Budget]) -> None:
        """Takes over what the store says."""
        now = self._clock()
        for budget in budgets:
            allowance = budget.training if self._kind == "training" else budget.sampling
            account = self._account(budget.tenant)
            account.tokens_per_minute = allowance.tokens_per_minute
            account.paid_at = now + allowance.debt.ToNanoseconds() / 1e9
            account.max_unfinished = budget.max_unfinished_operations
            account.learned_at = now

    def is_fresh(self, tenant: str, seconds: float) -> bool:
        """Tells whether the store said something of this tenant at most so long ago."""
        account = self._accounts.get(tenant)
        return account is not None and account.learned_at >= self._clock() - seconds

    def check(self, tenant: str) -> None:
        """Raises RATE_LIMITED, with the time to wait, when a tenant is over its budget."""
        account = self._accounts.get(tenant)
        if account is None:
            return
        if account.max_unfinished and account.num_unfinished >= account.max_unfinished:
            QUOTA_REFUSALS.labels("unfinished_operations").inc()
            raise make_error(
                "RATE_LIMITED",
                f"{account.num_unfinished} operations of yours are unfinished here, as many as may be; try again",
                UNFINISHED_WAIT_SECONDS,
            )
        if not account.tokens_per_minute:
            return
        now, rate = self._clock(), account.tokens_per_minute / 60.0
        # At most one minute's worth is saved up, also by a copy that is old.
        wait = max(account.paid_at, now - 60.0) + account.num_uncharged / rate - now
        if wait > 0:
            self._refused.add(tenant)
            QUOTA_REFUSALS.labels(f"{self._kind}_tokens").inc()
            raise make_error(
                "RATE_LIMITED",
                f"your quota of {account.tokens_per_minute} {self._kind} tokens per minute is used up for "
                f"{wait:.1f} s; try again then",
                min(wait, LONGEST_WAIT_SECONDS),
            )

    def window(self, tenant: str, num_operations: int) -> int:
        """Returns how many unfinished operations a tenant may have here, at most `num_operations`."""
        account = self._accounts.get(tenant)
        return min(account.max_unfinished or num_operations, num_operations) if account else num_operations

    def begin(self, tenant: str, num_tokens: int) -> None:
        """Counts accepted work in, with what it is expected to cost."""
        account = self._account(tenant)
        account.num_unfinished += 1
        account.num_uncharged += num_tokens

    def end(self, tenant: str) -> None:
        """Counts work out; what it used stays uncharged until it is released."""
        self._account(tenant).num_unfinished -= 1

    def release(self, tenant: str, num_tokens: int) -> None:
        """Takes back tokens of `begin`: the store has charged them, or they were not used."""
        self._account(tenant).num_uncharged -= num_tokens

    def tidy(self) -> list[str]:
        """Forgets tenants that have been away for long; returns those refused since: the store may know better."""
        until = self._clock() - KEPT_SECONDS
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.learned_at > until or account.num_unfinished or account.num_uncharged
        }
        refused, self._refused = sorted(self._refused), set()
        return refused

    def _account(self, tenant: str) -> _Account:
        return self._accounts.setdefault(tenant, _Account())
