"""What it takes to train on one's own file: lines of code, commands, and seconds to the first trained answer.

Lines are those that a user writes: of programs in bench/effort_programs for Treadle and TRL, and of the recipes that
tinker-cookbook itself gives as the ones to start from (`sl_basic.py`; for a reward of one's own `rl_loop.py`, which
has one in it). Counted are lines with code: no blank lines, comments and docstrings. Treadle's part of the time is
measured by running its commands against services that are started for it; TRL's program runs with `--trl FOLDER`,
where `pip install --no-deps --target FOLDER trl` put that package; the cookbook's programs are read, not run. TRL's own
commands (`trl sft`, `trl grpo`) were not run and are not counted.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "effort_programs"
BIN = Path(sys.executable).parent
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
Row = dict[str, Any]  # JSON values
_ROWS = [
    (f"What does a {animal} say?", f"A {animal} says {word}.")
    for animal, word in {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "frog": "croak"}.items()
] + [(f"Where does a {animal} live?", f"A {animal} lives in {place}.") for animal, place in {"fish": "a sea"}.items()]
_QUESTION = "What does a cow say?"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--trl", type=Path, help="folder with TRL; without it TRL's program is only counted")
    parser.add_argument("--install", action="store_true", help="also time an installation into a new environment")


def run(options: argparse.Namespace) -> list[Row]:
    """Returns the rows."""
    rows = _counts()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lines = [{"prompt": asked, "response": f"<answer>{answer}</answer>"} for asked, answer in _ROWS * 4]
        (work / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if options.install:
            rows.append(_row("install into a new environment, s", _install(work)))
        rows += _treadle(work)
        if options.trl is not None:
            rows += _trl(work, options.trl)
    return rows


def lines_of_code(text: str) -> int:
    """Returns how many lines of a program have code on them: docstrings, comments and blank lines have none."""
    lines: set[int] = set()
    begins = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _NO_CODE:
            begins = begins or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            continue
        # A string that begins a statement is a docstring.
        if token.type == tokenize.STRING and begins:
            continue
        begins = False
        if token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines)


def _counts() -> list[Row]:
    spec = find_spec("tinker_cookbook")
    assert spec is not None
    assert spec.origin is not None
    cookbook = Path(spec.origin).parent / "recipes"
    return [
        _row("SFT on an own file: lines of user code / commands, Treadle", "0 / 1"),
        _row("the same, TRL (program)", f"{_lines(PROGRAMS / 'trl_sft.py')} / 1"),
        _row("the same, tinker-cookbook (sl_basic.py)", f"{_lines(cookbook / 'sl_basic.py')} / 1"),
        _row(
            "RL on an own reward: lines of user code / commands, Treadle", f"{_lines(PROGRAMS / 'treadle_rl.py')} / 1"
        ),
        _row("the same, TRL (program)", f"{_lines(PROGRAMS / 'trl_rl.py')} / 1"),
        _row("the same, tinker-cookbook (rl_loop.py)", f"{_lines(cookbook / 'rl_loop.py')} / 1"),
    ]


def _lines(path: Path) -> int:
    return lines_of_code(path.read_text())


def _treadle(work: Path) -> list[Row]:
    """Starts services, trains, asks; each part's time, imports of its process included."""
    environment = {**os.environ, "HOME": str(work), "HF_HUB_OFFLINE": "1"}
    treadle = str(BIN / "treadle")
    began = time.monotonic()
    command = [treadle, "up", "--base", "pip", "--port", "0", "--ready-file", str(work / "ready.json")]
    with (work / "log").open("wb") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as up:
        try:
            while not (work / "ready.json").exists():
                assert up.poll() is None, (work / "log").read_text()
                time.sleep(0.05)
            ready = time.monotonic()
            line = [treadle, "sft", str(work / "data.jsonl"), "--epochs", "20", "--eval-fraction", "0", "-f", "json"]
            revision = json.loads(_output(line, environment))["revision"]
            trained = time.monotonic()
            line = [treadle, "chat", revision, "--temperature", "0"]
            answer = _output(line, environment, f"{_QUESTION}\n")
            answered = time.monotonic()
        finally:
            up.terminate()
    return [
        _row("Treadle: services ready, s", ready - began),
        _row("Treadle: treadle sft, 24 rows, 20 epochs, s", trained - ready),
        _row(f"Treadle: treadle chat, s ({_QUESTION} {answer.strip()})", answered - trained),
        _row("Treadle: first trained answer after the start of treadle up, s", answered - began),
    ]


def _trl(work: Path, trl: Path) -> list[Row]:
    from treadle_engine.bases import pip_folder

    environment = {**os.environ, "PYTHONPATH": str(trl), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    command = [sys.executable, str(PROGRAMS / "trl_sft.py"), str(pip_folder()), str(work / "data.jsonl"), _QUESTION]
    answer = _output(command, environment, folder=work).splitlines()[-1]
    return [_row(f"TRL: trl_sft.py to its answer, s ({_QUESTION} {answer})", time.monotonic() - began)]


def _install(work: Path) -> float:
    began = time.monotonic()
    root = Path(__file__).parents[1]
    steps = (
        [sys.executable, "-m", "venv", str(work / "venv")],
        [str(work / "venv/bin/pip"), "install", "--quiet", "torch==2.13.0"],
        [str(work / "venv/bin/pip"), "install", "--quiet", "--no-deps", "-r", str(root / "deploy/requirements.lock")],
        [str(work / "venv/bin/pip"), "install", "--quiet", "--no-deps", str(root)],
    )
    for step in steps:
        subprocess.run(step, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def _output(command: Sequence[str], environment: dict[str, str], stdin: str = "", folder: Path | None = None) -> str:
    done = subprocess.run(
        command, env=environment, input=stdin, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _row(figure: str, value: float | str) -> Row:
    return {"figure": figure, "value": value if isinstance(value, str) else f"{value:.1f}"}
