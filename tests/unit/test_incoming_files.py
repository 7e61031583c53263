"""Files on their way: what may be written where, and what is left of them."""

from pathlib import Path

from treadle_service.incoming_files import MOST_SPARE_BYTES, IncomingFiles


def incoming(folder: Path) -> IncomingFiles:
    (folder / "incoming").mkdir()
    return IncomingFiles(folder)


def test_a_spare_file_is_given_out_once_and_only_on_demand(tmp_path: Path) -> None:
    """It has the length that was asked for; whoever wants a new file gets none that is there."""
    files = incoming(tmp_path)
    files.prepare(3_000_000)
    (spare,) = (tmp_path / "incoming").iterdir()
    assert spare.read_bytes() == bytes(3_000_000)
    files.prepare(10)
    assert list((tmp_path / "incoming").iterdir()) == [spare]
    fresh = files.new()
    assert fresh is not None
    assert not fresh.exists()
    assert files.new(spare=True) == spare
    again = files.new(spare=True)
    assert again is not None
    assert not again.exists()
    assert files.path_of(spare.name) == spare


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Closed, the spare file goes, also one that is made just then; one that is too long is never made."""
    files = incoming(tmp_path)
    files.prepare(MOST_SPARE_BYTES + 1)
    assert list((tmp_path / "incoming").iterdir()) == []
    files.prepare(10)
    files.close()
    assert list((tmp_path / "incoming").iterdir()) == []
    files = IncomingFiles(tmp_path)
    files.close()
    files.prepare(10)
    assert list((tmp_path / "incoming").iterdir()) == []


def test_without_a_folder_there_are_no_files(tmp_path: Path) -> None:
    """Not shared, or not a store's: callers send their bytes. Names lead nowhere else."""
    for files in (IncomingFiles(None), IncomingFiles(tmp_path / "nowhere")):
        files.prepare(10)
        assert files.new() is None
        assert files.new(spare=True) is None
    assert IncomingFiles(None).path_of("0" * 32) is None
    assert incoming(tmp_path).path_of("../" + "0" * 29) is None
