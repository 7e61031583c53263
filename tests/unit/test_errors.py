"""The error catalogue survives the wire, and every reason leads to its exception."""

import pytest

from treadle.errors import CATALOGUE, from_operation_error, make_error, spec_of, to_operation_error, to_status


@pytest.mark.parametrize("reason", CATALOGUE)
def test_an_operation_error_comes_back_as_the_same_exception(reason: str) -> None:
    """Reason, sentence, class and waiting time round-trip."""
    error = make_error(reason, "what is wrong and what to do", retry_after_seconds=1.5)
    back = from_operation_error(to_operation_error(error))
    assert (type(back), back.reason, back.message) == (type(error), reason, error.message)
    assert back.retry_after_seconds == 1.5
    assert to_status(error).code == spec_of(reason).code.value[0]


def test_reasons_fit_the_rules_of_error_info() -> None:
    """google.rpc.ErrorInfo allows 63 characters of UPPER_SNAKE_CASE."""
    for reason in CATALOGUE:
        assert reason == reason.upper()
        assert len(reason) <= 63
        assert reason.replace("_", "").isalnum()


def test_a_reason_of_a_newer_server_counts_as_internal() -> None:
    """An old client must not break on it."""
    assert make_error("SOMETHING_NEW", "a sentence").reason == "SOMETHING_NEW"
    assert spec_of("SOMETHING_NEW") is CATALOGUE["INTERNAL"]
