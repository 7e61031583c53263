"""A worker's copy of what tenants may use."""

import pytest

from treadle.errors import LimitError
from treadle.internal.v1 import usage_pb2
from treadle_service.budgets import TenantBudgets


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def budget(rate: int = 0, debt_seconds: float = -60.0, max_unfinished: int = 0) -> usage_pb2.Budget:
    told = usage_pb2.Budget(tenant="acme", max_unfinished_operations=max_unfinished)
    told.training.tokens_per_minute = rate
    told.training.debt.FromNanoseconds(int(debt_seconds * 1e9))
    return told


def wait(budgets: TenantBudgets) -> float:
    """Returns how long the tenant is told to wait; 0 when it is let in."""
    try:
        budgets.check("acme")
    except LimitError as error:
        return error.retry_after_seconds or 0.0
    return 0.0


def test_the_refusal_may_be_tried_again():
    """It is the reason that clients wait for."""
    budgets = TenantBudgets("training")
    budgets.learn([budget(rate=1, debt_seconds=1.0)])
    with pytest.raises(LimitError) as caught:
        budgets.check("acme")
    assert (caught.value.reason, caught.value.retryable) == ("RATE_LIMITED", True)


def test_a_tenant_without_a_quota_may_do_anything():
    """Also one that nobody has told anything about."""
    budgets = TenantBudgets("training")
    assert wait(budgets) == 0
    budgets.learn([budget()])
    budgets.begin("acme", 10**12)
    assert wait(budgets) == 0
    assert budgets.window("acme", 16) == budgets.window("unknown", 16) == 16


def test_what_is_accepted_counts_before_it_is_charged():
    """The last operation may go into debt; the next waits until that is charged and paid."""
    clock = Clock()
    budgets = TenantBudgets("training", clock)
    budgets.learn([budget(rate=600)])
    budgets.begin("acme", 599)
    assert wait(budgets) == 0
    budgets.begin("acme", 51)
    assert wait(budgets) == pytest.approx(5.0)
    clock.now += 100.0
    assert wait(budgets) == pytest.approx(5.0)
    budgets.release("acme", 650)
    budgets.learn([budget(rate=600, debt_seconds=5.0)])
    clock.now += 5.0
    assert wait(budgets) == 0
    assert budgets.tidy() == ["acme"]
    assert budgets.tidy() == []


def test_a_charge_takes_the_place_of_what_was_expected():
    """Released and learned at once, nothing is counted twice."""
    clock = Clock()
    budgets = TenantBudgets("training", clock)
    budgets.learn([budget(rate=600)])
    budgets.begin("acme", 650)
    before = wait(budgets)
    budgets.end("acme")
    budgets.release("acme", 650)
    budgets.learn([budget(rate=600, debt_seconds=5.0)])
    assert wait(budgets) == pytest.approx(before) == pytest.approx(5.0)


def test_nobody_is_told_to_wait_for_long_and_a_raised_quota_counts_at_once():
    """The debt may be hours, the quota may be raised in minutes."""
    budgets = TenantBudgets("training", Clock())
    budgets.learn([budget(rate=1, debt_seconds=86_400)])
    assert wait(budgets) == 30.0
    budgets.learn([budget(rate=10**6, debt_seconds=0.0)])
    assert wait(budgets) == 0


def test_an_old_copy_saves_up_one_minute_and_no_more():
    """What the store would say if it were asked."""
    clock = Clock()
    budgets = TenantBudgets("training", clock)
    budgets.learn([budget(rate=600, debt_seconds=10.0)])
    clock.now += 3600
    budgets.begin("acme", 601)
    assert wait(budgets) == pytest.approx(0.1)


def test_unfinished_work_is_bounded():
    """A short wait, since it ends when work ends; the window of a stream says the same beforehand."""
    budgets = TenantBudgets("training")
    budgets.learn([budget(max_unfinished=2)])
    assert (budgets.window("acme", 16), budgets.window("acme", 1)) == (2, 1)
    budgets.begin("acme", 0)
    assert wait(budgets) == 0
    budgets.begin("acme", 0)
    assert wait(budgets) == 0.5
    budgets.end("acme")
    assert wait(budgets) == 0


def test_tenants_that_have_gone_are_forgotten():
    """Those with unfinished work are not."""
    clock = Clock()
    budgets = TenantBudgets("training", clock)
    budgets.learn([budget(rate=600)])
    assert budgets.is_fresh("acme", 10)
    budgets.begin("acme", 1)
    clock.now += 3600
    budgets.tidy()
    budgets.end("acme")
    budgets.release("acme", 1)
    assert not budgets.is_fresh("acme", 10)
    budgets.tidy()
    assert wait(budgets) == 0
