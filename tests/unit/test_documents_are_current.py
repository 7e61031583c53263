"""Tables in the documents say what the code says."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_the_code_generates(document: Path) -> None:
    """Run `python docs/tables.py` after changing a setting or an error."""
    assert document.read_text() == tables.render(document)
