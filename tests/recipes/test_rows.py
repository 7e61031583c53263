"""Rows from every kind of file, and errors that say where."""

import json
from pathlib import Path

import pytest

from treadle.recipes.configs import DataConfig
from treadle.recipes.rows import DataError, read_rows

ROWS = [{"prompt": "a, b", "response": 'say "x"\n'}, {"prompt": "ü", "response": "z"}]


def read(path: Path, **options) -> list[tuple[dict, str]]:
    return [(dict(row.values), row.where) for row in read_rows(DataConfig(data=str(path), **options))]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_and_json(tmp_path: Path) -> None:
    """Blank lines are skipped and counted; a byte order mark does no harm."""
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    path = write(tmp_path, "data.jsonl", lines + "\n")
    assert read(path) == [(ROWS[0], f"{path}:1"), (ROWS[1], f"{path}:3")]
    assert len(read(path, limit=1)) == 1
    path = write(tmp_path, "data.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert read(path) == [(ROWS[0], f"{path}[0]"), (ROWS[1], f"{path}[1]")]


def test_csv_rows_know_the_line_they_begin_on(tmp_path: Path) -> None:
    """A field in quotes may hold delimiters, quotes and line ends."""
    path = write(tmp_path, "data.csv", 'prompt,response\n"a, b","say ""x""\n"\nü,z\n')
    assert read(path) == [(ROWS[0], f"{path}:2"), (ROWS[1], f"{path}:4")]
    path = write(tmp_path, "data.tsv", "prompt\tresponse\nü\tz\n")
    assert read(path) == [(ROWS[1], f"{path}:2")]


def test_parquet_folders_and_saved_datasets_are_read_by_the_package_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three give the same rows; a row's place is its number."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = datasets.Dataset.from_list(ROWS)
    path, folder, saved = tmp_path / "rows.parquet", tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    made.to_parquet(path)
    made.to_parquet(folder / "train.parquet")
    made.save_to_disk(saved)
    for place in (path, folder, saved):
        assert read(place) == [(ROWS[0], f"{place}[0]"), (ROWS[1], f"{place}[1]")]
    assert [dict(row.values) for row in read_rows(DataConfig(data=f"hf:{folder}"))] == ROWS
    with pytest.raises(DataError, match="the package datasets cannot read it"):
        read(write(tmp_path, "broken.parquet", "no parquet"))


@pytest.mark.parametrize(
    ("name", "content", "place", "problem"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": x}\n', ":2:12", "not JSON: Expecting value"),
        ("a.jsonl", '{"prompt": "x"}\n[1]\n', ":2", "a row is an object with columns, not list"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', ":2:13", "not UTF-8: byte 0xff"),
        ("a.jsonl", "\n", "", "there are no rows"),
        ("a.json", '[{"prompt": "x"},\n {"prompt" "y"}]', ":2:12", "not JSON: Expecting ':' delimiter"),
        ("a.json", '{"prompt": "x"}', "", "call the file .jsonl"),
        ("a.csv", "prompt,response\nx,y\nx\n", ":3:2", "no field for column 'response'"),
        ("a.csv", "prompt,response\nx,y,z\n", ":2:3", "3 fields under 2 columns"),
        ("a.csv", 'prompt,response\n"x,y\n', ":2", "not CSV: unexpected end of data"),
        ("a.csv", b"prompt,response\nx,y\xff\n", ":2:4", "not UTF-8"),
        ("a.txt", "x", "", "must end in .jsonl"),
    ],
)
def test_an_error_names_file_line_and_column(
    tmp_path: Path, name: str, content: str | bytes, place: str, problem: str
) -> None:
    """And says what is wrong there."""
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{place}: ")
    assert problem in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Is a mistake in the command, and the message says what else a name can be."""
    with pytest.raises(DataError, match="no such file or folder; a Hugging Face dataset is hf:NAME"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="no file was given"):
        read_rows(DataConfig())
