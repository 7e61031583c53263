"""Compares the protos with those of the last release, kept in tests/releases; incompatible changes fail."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def last_release() -> Path:
    """Returns the folder of the newest release that is kept."""
    folders = [folder for folder in (ROOT / "tests/releases").iterdir() if folder.is_dir()]
    return max(folders, key=lambda folder: [int(part) for part in folder.name.split(".")])


def main() -> int:
    """Runs `buf breaking` and returns its exit code."""
    release = last_release()
    print(f"comparing with {release.name}")
    buf = str(Path(sys.executable).with_name("buf"))
    return subprocess.run(
        [buf, "breaking", "protos", "--against", str(release / "protos.binpb")], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
