"""Runs the code blocks of a Markdown page as one program, in their order, in a folder and a home of the page's own.

    ```sh              runs in one bash for the whole page, so that variables last; a failing line fails the page
    ```python          runs as a program of its own
    ```python NAME     is written to the file NAME, as ```jsonl NAME and others are
    ```text            is what the block before it printed; `...` stands for anything

A block below `<!-- run by PATH -->` is run by the test PATH instead, which must name the page's command.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- run by (?P<test>\S+) -->\n)? *```(?P<kind>\w+)(?: (?P<file>\S+))?\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_MARK = "<<<end of block>>>"


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    kind: str
    file: str
    test: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    """Returns the page's blocks in order, without their indentation."""
    found = []
    for match in _BLOCK.finditer(page.read_text()):
        indent = len(match["indent"])
        code = "".join(line[indent:] if line.strip() else line for line in match["code"].splitlines(keepends=True))
        found.append(Block(match["kind"], match["file"] or "", match["test"] or "", code))
    return found


def run_page(page: Path, folder: Path, home: Path, address: str, key: str) -> None:
    """Runs all blocks; raises AssertionError when one fails or prints something else than the page shows."""
    script, expected = ["set -euo pipefail"], []
    for number, block in enumerate(blocks_of(page)):
        if block.test:
            assert (ROOT / block.test).is_file(), f"{page}: there is no test {block.test}"
        elif block.kind == "text":
            if expected:
                expected[-1] = block.code
        elif block.file or block.kind not in ("sh", "python"):
            assert block.file, f"{page}: a block of {block.kind} is no program and has no file name"
            (folder / block.file).write_text(block.code)
        else:
            (folder / f"block-{number}.py").write_text(block.code)
            script += [block.code if block.kind == "sh" else f"python block-{number}.py", f"echo '{_MARK}'"]
            expected.append("...")
    environment = {
        **os.environ,
        "HOME": str(home),
        "TREADLE_ADDRESS": address,
        # A page that makes a key begins like a new terminal, without one.
        **({} if "treadle key create" in page.read_text() else {"TREADLE_API_KEY": key}),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for shown, printed in zip(expected, done.stdout.split(f"{_MARK}\n")[:-1], strict=True):
        assert matches(shown, printed), f"{page} shows\n{shown}\nand its program printed\n{printed}"


def matches(shown: str, printed: str) -> bool:
    """Tells whether the output is what is shown, where `...` stands for any text."""
    pattern = ".*?".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None
