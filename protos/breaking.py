"""Compares the protos with those of the last tag; incompatible changes fail. Without a tag there is nothing to keep."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def last_tag() -> str:
    """Returns the newest tag that HEAD descends from, empty for none."""
    found = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def main() -> int:
    """Runs `buf breaking` and returns its exit code."""
    tag = last_tag()
    if not tag:
        print("no tag yet: nothing to compare with")
        return 0
    print(f"comparing with {tag}")
    against = f"{ROOT}/.git#tag={tag},subdir=protos"
    buf = str(Path(sys.executable).with_name("buf"))
    return subprocess.run([buf, "breaking", "protos", "--against", against], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
