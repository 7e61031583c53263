"""What rank 0 sends to ranks that do not see its files."""

from pathlib import Path

from treadle_trainer.ranks import without_paths


def test_files_travel_as_their_contents(tmp_path: Path) -> None:
    """Wherever they stand among a call's arguments; all else stays as it is."""
    file = tmp_path / "weights"
    file.write_bytes(b"\x01\x02")
    assert without_paths(file) == b"\x01\x02"
    assert without_paths({"files": {"weights": file, "config": b"{}"}, "with_optimizer": True}) == {
        "files": {"weights": b"\x01\x02", "config": b"{}"},
        "with_optimizer": True,
    }
