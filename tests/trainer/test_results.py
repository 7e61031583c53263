"""When a result may be shown, and when it is forgotten."""

from treadle_trainer.results import MAX_UNACKED, ResultLog, StoredResult


def test_a_result_waits_for_its_operation_to_be_durable() -> None:
    """Computed first, appended later: shown then."""
    log = ResultLog()
    assert not log.put(1, StoredResult(b"one", failed=False))
    assert log.get(1) is None
    assert log.mark_appended(1)
    assert log.get(1) == StoredResult(b"one", failed=False)


def test_a_failure_waits_for_its_own_commit_and_holds_up_what_follows() -> None:
    """A crash must not turn a reported failure into a success."""
    log = ResultLog()
    log.mark_appended(2)
    log.put(1, StoredResult(b"bad", failed=True))
    log.put(2, StoredResult(b"good", failed=False))
    assert log.shown_seq == 0
    assert log.mark_committed(1)
    assert log.shown_seq == 2


def test_acknowledged_results_are_forgotten_but_never_unshown_ones() -> None:
    """An acknowledgement of the future counts up to what was shown."""
    log = ResultLog()
    log.mark_appended(3)
    for seq in (1, 2):
        log.put(seq, StoredResult(b"x", failed=False))
    log.ack(9)
    assert log.acked_seq == 2
    log.put(3, StoredResult(b"y", failed=False))
    assert log.get(3) is not None


def test_a_client_that_never_acknowledges_keeps_a_bounded_number() -> None:
    """The oldest go first."""
    log = ResultLog()
    log.mark_appended(MAX_UNACKED + 10)
    for seq in range(1, MAX_UNACKED + 11):
        log.put(seq, StoredResult(b"x", failed=False))
    assert log.acked_seq == 10
    assert log.get(10) is None
    assert log.get(11) is not None
