"""Processes killed, frozen and cut off at random under three tenants' load: in the end nobody can tell."""

from pathlib import Path

import pytest

from tests.crash.storm import endure


@pytest.mark.timeout(600)
def test_forty_random_kills_change_nothing(tmp_path: Path) -> None:
    """All numbers of all tenants equal those of undisturbed loops; freezes and cuts come on top of the kills."""
    report = endure(tmp_path, seed=3, kills=40)
    assert report.faults["kill"] == 40
    assert report.differences == []
    assert report.stuck == []
    assert report.num_acknowledged > 200
    assert report.num_moved > 0
