"""Every code block of the documents does what the page says, and every example runs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, matches, run_page
from tests.support.cluster import Cluster

PAGES = [
    *(ROOT / f"docs/{name}.md" for name in ("tour", "concepts", "adapters", "dashboard")),
    *sorted((ROOT / "docs/recipes").glob("*.md")),
]
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


@pytest.fixture
def home(cluster: Cluster, tmp_path: Path) -> Path:
    """A person's home as `treadle up` leaves it: the gateway's address and the administrator's key."""
    data = tmp_path / "home/.treadle"
    data.mkdir(parents=True)
    (data / "up.json").write_text(json.dumps({"gateway": cluster.gateway_address}))
    (data / "admin.key").write_text(cluster.admin_key)
    return data.parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(cluster: Cluster, page: Path, home: Path, tmp_path: Path) -> None:
    """All its programs run, in their order, and print what it shows."""
    folder = tmp_path / "work"
    folder.mkdir()
    run_page(page, folder, home, address=cluster.gateway_address, key=cluster.new_tenant())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_prints_what_its_docstring_says(cluster: Cluster, example: Path, tmp_path: Path) -> None:
    """What comes after `Prints:` there, with `...` for anything."""
    docstring = ast.get_docstring(ast.parse(example.read_text()))
    assert docstring
    environment = {**os.environ, "TREADLE_ADDRESS": cluster.gateway_address, "TREADLE_API_KEY": cluster.new_tenant()}
    done = subprocess.run(
        [sys.executable, str(example)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = docstring.split("Prints:\n")[1]
    assert matches("\n".join(line.strip() for line in shown.splitlines()), done.stdout), done.stdout


def test_links_lead_somewhere() -> None:
    """Those of these pages, of the README and of the list of documents, to files of the repository."""
    for page in (*PAGES, ROOT / "README.md", ROOT / "docs/README.md"):
        for target in re.findall(r"\]\(([^)#:\s]*[./][^)#:\s]*)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page} links {target}"
