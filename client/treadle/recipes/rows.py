"""Rows of a data set: from JSON lines, JSON, CSV, Parquet, or whatever the package `datasets` loads.

Every row knows where it came from, so that an error names file, line and column. Knows nothing of what rows mean.
"""

import csv
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from treadle.recipes.configs import DataConfig

HUB_PREFIX = "hf:"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class DataError(ValueError):
    """A row cannot be used; says where it is and what is wrong with it."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its place, for example `data.jsonl:17`."""

    values: Mapping[str, Any]  # Any: whatever JSON or Parquet can hold.
    where: str

    def error(self, problem: str, column: str = "") -> DataError:
        """Returns an error that names the row, and the column if there is one to name."""
        return DataError(self.where, f"column {column!r}: {problem}" if column else problem)


def read_rows(config: DataConfig, source: str = "") -> list[Row]:
    """Returns the rows of `source`, of `config.data` when empty, at most `config.limit`.

    Raises:
        DataError: there is no such source, it is malformed, or it has no rows.
    """
    source = source or config.data
    if not source:
        raise DataError("data", "no file was given")
    rows = list(islice(_open(source, config), config.limit))
    if not rows:
        raise DataError(source, "there are no rows")
    return rows


def _open(source: str, config: DataConfig) -> Iterator[Row]:
    if source.startswith(HUB_PREFIX):
        return _from_datasets(source.removeprefix(HUB_PREFIX), source, config)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(source, f"no such file or folder; a Hugging Face dataset is {HUB_PREFIX}NAME")
    if path.is_dir() or path.suffix == ".parquet":
        return _from_datasets(str(path), source, config)
    if path.suffix in _DELIMITERS:
        return _from_csv(path, _DELIMITERS[path.suffix])
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _from_json_lines(path)
    raise DataError(source, "the name must end in .jsonl, .json, .csv, .tsv or .parquet")


def _from_json_lines(path: Path) -> Iterator[Row]:
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        line = _text(raw, f"{path}:{number}")
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}:{error.colno}", f"not JSON: {error.msg}") from error
        yield _row(values, f"{path}:{number}")


def _from_json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(_text(path.read_bytes(), f"{path}"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}", f"not JSON: {error.msg}") from error
    if not isinstance(values, list):
        raise DataError(str(path), "not a list of objects; for one object per line call the file .jsonl")
    return (_row(value, f"{path}[{index}]") for index, value in enumerate(values))


def _row(values: Any, where: str) -> Row:  # Any: parsed JSON.
    if not isinstance(values, dict):
        raise DataError(where, f"a row is an object with columns, not {type(values).__name__}")
    return Row(values, where)


def _from_csv(path: Path, delimiter: str) -> Iterator[Row]:
    text = _text(path.read_bytes(), str(path))
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    try:
        for fields in reader:
            where, begins = f"{path}:{begins}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
            elif len(fields) != len(header):
                raise DataError(f"{where}:{min(len(fields), len(header)) + 1}", _miscounted(fields, header))
            else:
                yield Row(dict(zip(header, fields, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}", f"not CSV: {error}") from error


def _miscounted(fields: list[str], header: list[str]) -> str:
    if len(fields) > len(header):
        return f"{len(fields)} fields under {len(header)} columns; quote a field that has a delimiter in it"
    return f"no field for column {header[len(fields)]!r}"


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n"), len(before) - before.rfind(b"\n")
        place = f"{where}:{column}" if raw.count(b"\n") == 0 else f"{where}:{line + 1}:{column}"
        raise DataError(place, f"not UTF-8: byte 0x{raw[error.start]:02x}") from error


def _from_datasets(name: str, source: str, config: DataConfig) -> Iterator[Row]:
    """Rows by the package `datasets`: Parquet files, folders, saved datasets, names on the Hub."""
    try:
        datasets: Any = importlib.import_module("datasets")  # An optional package of untyped functions.
    except ImportError as error:
        raise DataError(source, "this needs the package datasets: pip install 'treadle[data]'") from error
    try:
        for index, values in enumerate(_load(datasets, name, config)):
            yield Row(values, f"{source}[{index}]")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(source, f"the package datasets cannot read it: {error}") from error


def _load(datasets: Any, name: str, config: DataConfig) -> Iterable[Mapping[str, Any]]:
    path = Path(name)
    rows: Iterable[Mapping[str, Any]]
    if path.is_dir() and (path / "state.json").exists():
        rows = datasets.load_from_disk(name)
    elif path.suffix == ".parquet":
        rows = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
    else:
        rows = datasets.load_dataset(name, config.subset or None, split=config.split, streaming=True)
    return rows
