"""When a replay's state digest says that it went another way."""

from treadle_trainer.operations import differ

ONE, OTHER = b"\x01" * 16, b"\x02" * 16


def test_digests_of_equally_many_ranks_are_compared() -> None:
    """Those of others round otherwise, and say nothing."""
    two, three = b"\x02\x00", b"\x03\x00"
    assert differ(ONE, OTHER)
    assert differ(ONE + two, OTHER + two)
    assert not differ(ONE + two, ONE + two)
    assert not differ(ONE, OTHER + two)
    assert not differ(ONE + three, OTHER + two)
    assert not differ(ONE, b"")
    assert not differ(b"", ONE)


def test_what_is_no_digest_differs() -> None:
    """Damage is not mistaken for another number of ranks."""
    assert differ(ONE, b"\x01" * 32)
    assert differ(ONE, ONE[:8])
