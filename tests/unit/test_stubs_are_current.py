"""The committed stubs are what the protos generate."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_committed_stubs_equal_generated_ones(tmp_path: Path) -> None:
    """Regenerates every stub and compares it byte by byte with the committed one."""
    subprocess.run([sys.executable, "protos/generate.py", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    generated = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    committed = {name: (ROOT / "client" / name).read_bytes() for name in generated}
    assert generated == committed
    folders = (ROOT / "client/treadle/v1", ROOT / "client/treadle/internal")
    present = {
        p.relative_to(ROOT / "client") for f in folders for p in f.rglob("*.py*") if "__pycache__" not in p.parts
    }
    assert present == set(generated), "a stub without a proto"
