"""How long passes may be beside a tenant that brings little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle_trainer.pass_length import RECENT_SECONDS, PassLength

SECONDS = st.floats(1e-4, 1.0)


def test_one_tenant_fills_passes() -> None:
    """However many runs it has, and however little one of them brings."""
    assert PassLength(0.005).limit([("a", 0.9), ("a", 0.001)], 0.0, 0.25) == 0.25


def test_passes_last_a_tenants_share_of_the_lightest() -> None:
    """Beside one with 30 ms, a flood gets passes of 2 x 30 ms; beside two of them, of 3 x 30 ms."""
    length = PassLength(0.001)
    assert length.limit([("flood", 2.0), ("flood", 2.0), ("light", 0.03)], 0.0, 0.25) == pytest.approx(0.06)
    assert length.limit([("flood", 4.0), ("light", 0.03), ("other", 0.03)], 0.1, 0.25) == pytest.approx(0.09)


def test_a_light_tenant_counts_while_it_is_away_for_a_moment() -> None:
    """The pass that it would wait for is short too; a second later nobody waits for it."""
    length = PassLength(0.001)
    length.limit([("flood", 2.0), ("light", 0.03)], 0.0, 0.25)
    assert length.limit([("flood", 2.0)], 0.5, 0.25) == pytest.approx(0.06)
    assert length.limit([("flood", 2.0)], RECENT_SECONDS, 0.25) == 0.25


def test_the_rest_of_a_batch_does_not_make_its_tenant_light() -> None:
    """What it brought a moment before counts, so that two equal tenants share full passes."""
    length = PassLength(0.001)
    length.limit([("a", 0.5), ("b", 0.5)], 0.0, 0.25)
    assert length.limit([("a", 0.01), ("b", 0.5)], 0.2, 0.25) == 0.25


def test_a_tiny_operation_does_not_make_passes_all_overhead() -> None:
    """Their fixed cost stays an eighth at most."""
    length = PassLength(0.007)
    limit = length.limit([("flood", 2.0), ("light", 0.0005)], 0.0, 0.25)
    assert limit == pytest.approx(0.049)
    assert 0.007 / (0.007 + limit) == pytest.approx(0.125)


def test_without_a_measured_cost_nothing_is_known() -> None:
    """Then tokens alone limit a pass."""
    assert PassLength(0.0).limit([("a", 0.0), ("b", 0.0)], 0.0, 0.25) == 0.25


@given(st.lists(st.tuples(st.sampled_from("abcd"), SECONDS), min_size=1), SECONDS)
def test_passes_hold_what_equal_tenants_bring(waiting: list[tuple[str, float]], most: float) -> None:
    """The limit is at least the lightest tenant's and never more than the target."""
    limit = PassLength(0.0).limit(waiting, 0.0, most)
    lightest = min(sum(seconds for name, seconds in waiting if name == tenant) for tenant, _ in waiting)
    assert min(lightest, most) - 1e-9 <= limit <= most
