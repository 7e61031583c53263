"""The order of a run's operations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import SeqReusedError, SequenceError, make_error
from treadle_trainer.runs import WINDOW_BYTES, WINDOW_OPS, Offer, RunOrder, Verdict

KINDS = ("forward", "forward_backward", "optim_step", "save_state", "load_state", "barrier")


def offer(
    seq: int, kind: str = "forward_backward", digest: int = 0, size: int = 10, timeout: float | None = None
) -> Offer[None]:
    return Offer(seq, digest or seq, kind, size, None, timeout)


def order_of(*kinds: str) -> RunOrder[None]:
    order: RunOrder[None] = RunOrder()
    for seq, kind in enumerate(kinds, 1):
        assert order.offer(offer(seq, kind), 0.0, done_seq=0) is Verdict.NEW
    return order


def test_a_repeat_is_a_duplicate_also_after_it_finished() -> None:
    """The same seq and digest never enters twice."""
    order = order_of("forward")
    assert order.offer(offer(1, "forward"), 0.0, done_seq=0) is Verdict.DUPLICATE
    order.finish(1, failed=False)
    assert order.offer(offer(1, "forward"), 0.0, done_seq=1) is Verdict.DUPLICATE
    assert order.next_seq == 2


def test_another_content_under_a_used_seq_is_refused() -> None:
    """SEQ_REUSED names the next free seq."""
    order = order_of("forward")
    with pytest.raises(SeqReusedError, match="next free seq is 2"):
        order.offer(offer(1, digest=99), 0.0, done_seq=0)


def test_a_gap_is_refused_or_held_as_asked() -> None:
    """A stream gets SEQ_GAP; a single call may wait, and enters when the missing one comes."""
    order: RunOrder[None] = RunOrder()
    with pytest.raises(SequenceError, match="expects seq 1, got 3"):
        order.offer(offer(3), 0.0, done_seq=0)
    assert order.offer(offer(3), 0.0, done_seq=0, hold=True) is Verdict.HELD
    assert order.offer(offer(2), 0.0, done_seq=0, hold=True) is Verdict.HELD
    with pytest.raises(SeqReusedError):
        order.offer(offer(3, digest=99), 0.0, done_seq=0, hold=True)
    assert order.offer(offer(1), 0.0, done_seq=0) is Verdict.NEW
    assert [op.seq for op in order] == [1, 2, 3]


def test_a_forgotten_held_operation_leaves_its_place_free() -> None:
    """Nobody waits forever for a gap."""
    order: RunOrder[None] = RunOrder()
    order.offer(offer(2), 0.0, done_seq=0, hold=True)
    order.forget_held(2)
    order.offer(offer(1), 0.0, done_seq=0)
    assert order.next_seq == 2


@pytest.mark.parametrize("hold", [False, True])
def test_the_window_bounds_operations_and_bytes(hold: bool) -> None:
    """Beyond the credit nothing is taken, held or not; one operation alone always fits."""
    order: RunOrder[None] = RunOrder()
    with pytest.raises(SequenceError) as caught:
        order.offer(offer(WINDOW_OPS + 1), 0.0, done_seq=0, hold=hold)
    assert caught.value.reason == "CREDIT_EXCEEDED"
    order.offer(offer(1, size=WINDOW_BYTES), 0.0, done_seq=0)
    with pytest.raises(SequenceError) as caught:
        order.offer(offer(2, size=1), 0.0, done_seq=0, hold=hold)
    assert caught.value.reason == "CREDIT_EXCEEDED"


def test_only_leading_passes_may_share() -> None:
    """Consecutive forward and forward_backward run together; a step ends the row."""
    order = order_of("forward", "forward_backward", "optim_step", "forward_backward")
    assert [op.seq for op in order.runnable_batch()] == [1, 2]
    order.finish(1, failed=False)
    order.finish(2, failed=False)
    assert order.runnable_batch() == []


def test_a_step_behind_a_failed_batch_fails_once_and_drops_the_gradient() -> None:
    """After DEPENDENCY_FAILED the run is clean again."""
    order = order_of("forward_backward", "forward_backward", "optim_step", "forward_backward", "optim_step")
    order.finish(1, failed=True)
    order.finish(2, failed=False)
    head = order.head()
    assert head is not None
    assert head.doom is not None
    assert (head.doom.reason, head.depends_on) == ("DEPENDENCY_FAILED", 1)
    assert "forward_backward 1 failed" in head.doom.message
    assert order.finish(3, failed=True).drop_gradient
    order.finish(4, failed=False)
    head = order.head()
    assert head is not None
    assert head.doom is None
    assert not order.finish(5, failed=False).drop_gradient


def test_a_failed_forward_hurts_no_step() -> None:
    """Only what adds to the gradient can spoil it."""
    order = order_of("forward", "optim_step")
    order.finish(1, failed=True)
    head = order.head()
    assert head is not None
    assert head.doom is None


def test_a_barrier_reports_failures_and_drops_a_spoilt_gradient() -> None:
    """It counts since the barrier before it."""
    order = order_of("forward_backward", "forward", "barrier", "optim_step", "barrier")
    order.finish(1, failed=True)
    order.finish(2, failed=True)
    finished = order.finish(3, failed=False)
    assert (finished.num_failed, finished.drop_gradient) == (2, True)
    head = order.head()
    assert head is not None
    assert head.doom is None
    order.finish(4, failed=False)
    assert order.finish(5, failed=False).num_failed == 0


def test_a_barrier_keeps_a_whole_gradient() -> None:
    """Waiting for everything is not the same as giving up."""
    order = order_of("forward_backward", "barrier")
    order.finish(1, failed=False)
    assert not order.finish(2, failed=False).drop_gradient


def test_a_step_that_was_cancelled_leaves_no_gradient_behind() -> None:
    """The next step must not apply two batches."""
    order = order_of("forward_backward", "optim_step")
    order.finish(1, failed=False)
    assert order.doom(2, lambda op: make_error("CANCELLED", "cancelled")) == [2]
    assert order.finish(2, failed=True).drop_gradient


def test_what_waits_too_long_fails_at_its_turn() -> None:
    """A timeout counts from acceptance and spares what has started."""
    order: RunOrder[None] = RunOrder()
    order.offer(offer(1, timeout=5.0), 100.0, done_seq=0)
    order.offer(offer(2, timeout=1.0), 100.0, done_seq=0)
    assert order.next_expiry() == 101.0
    next(iter(order)).started_at = 100.5
    order.expire(200.0)
    dooms = [op.doom.reason if op.doom else None for op in order]
    assert dooms == [None, "QUEUE_TIMEOUT"]
    assert order.next_expiry() is None


def test_cancelling_spares_what_has_started() -> None:
    """Only operations that have not started are cancelled."""
    order = order_of("forward_backward", "forward_backward", "optim_step")
    next(iter(order)).started_at = 0.0
    assert order.doom(1, lambda op: make_error("CANCELLED", f"{op.seq}")) == [2, 3]


def test_the_boundary_follows_operations_that_leave_no_gradient() -> None:
    """A snapshot may stand behind a step, a save or a forward, not behind a pending gradient."""
    order = order_of("forward", "forward_backward", "save_state", "optim_step", "save_state")
    seen = []
    for seq in range(1, 6):
        order.finish(seq, failed=False)
        seen.append(order.boundary_seq)
    assert seen == [1, 1, 1, 4, 5]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 6), st.sampled_from(KINDS), st.booleans()),
        st.tuples(st.just("finish"), st.booleans()),
        st.tuples(st.just("doom"), st.integers(1, 40)),
        st.tuples(st.just("expire"), st.floats(0, 100)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_whatever_arrives_operations_end_once_and_in_order(actions: list[tuple]) -> None:  # type: ignore[type-arg]
    """Random offers, failures, cancels and timeouts keep the order dense, and no step follows a spoilt gradient."""
    order: RunOrder[None] = RunOrder()
    sent: dict[int, str] = {}
    ended: list[int] = []
    spoilt = False
    for action in actions:
        match action:
            case ("offer", ahead, kind, hold):
                seq = max(1, order.next_seq + ahead - 2)
                new = offer(seq, kind, digest=1 + KINDS.index(kind), timeout=50.0)
                try:
                    verdict = order.offer(new, 0.0, done_seq=len(ended), hold=hold)
                except (SequenceError, SeqReusedError):
                    continue
                assert verdict is not Verdict.DUPLICATE or sent[seq] == kind
                sent.setdefault(seq, kind)
            case ("finish", failed):
                head = order.head()
                if head is None:
                    continue
                if head.kind == "optim_step" and spoilt:
                    assert head.doom is not None
                failed = failed or head.doom is not None
                order.finish(head.seq, failed=failed)
                ended.append(head.seq)
                if head.kind == "forward_backward":
                    spoilt = spoilt or failed
                elif head.kind == "optim_step" or (head.kind in ("load_state", "barrier") and not failed):
                    spoilt = False
            case ("doom", seq):
                order.doom(seq, lambda op: make_error("CANCELLED", f"{op.seq}"))
            case ("expire", now):
                order.expire(now)
        assert ended == list(range(1, len(ended) + 1))
        assert [op.seq for op in order] == list(range(len(ended) + 1, order.next_seq))
