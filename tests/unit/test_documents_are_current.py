"""Tables in the documents say what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables, performance, api = _script("tables"), _script("performance"), _script("api")


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_the_code_generates(document: Path) -> None:
    """Run `python docs/tables.py` after changing a setting or an error."""
    assert document.read_text() == tables.render(document)


def test_every_endpoint_of_the_tinker_face_has_a_test_that_is_there() -> None:
    """As docs/tinker.md says."""
    routes = {line.split(" | ")[0].removeprefix("| ") for line in tables.tinker_table().splitlines()[2:]}
    assert routes == set(tables.TESTS)
    for where in tables.TESTS.values():
        file, _, test = where.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(), where


def test_performance_page_shows_the_runs_that_are_kept() -> None:
    """Run `python docs/performance.py` after keeping a run with `python -m bench NAME --save TAG`."""
    assert performance.PAGE.read_text() == performance.render()


def test_the_reference_is_made_of_the_docstrings() -> None:
    """Run `python docs/api.py` after changing what users import."""
    assert api.PAGE.read_text() == api.render()
