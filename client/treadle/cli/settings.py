"""Where the command line finds things on this machine: the data folder, its files, the environment for children.

The one place of the command line that reads the environment itself; options read theirs through click.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

DEFAULT_DATA_DIR = "~/.treadle"
DEFAULT_ADDRESS = "127.0.0.1:7600"


@dataclass(frozen=True)
class UpFile:
    """What `treadle up` writes for others on the machine, as JSON."""

    gateway: str
    base: str
    admin_key_file: str
    pid: int
    pids: dict[str, int]
    addresses: dict[str, str]
    # Where the HTTP faces are, as a URL.
    http: str = ""
    # All that are served; `base` is the first.
    bases: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Replaces the file at `path` in one step, so that a reader never sees half of it."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n")
        scratch.replace(path)


def gateway_address(data_dir: Path) -> str:
    """Returns the address of the Treadle that runs over `data_dir`, or the default one."""
    try:
        address = json.loads((data_dir / "up.json").read_text())["gateway"]
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_ADDRESS
    return str(address)


def admin_key(data_dir: Path) -> str | None:
    """Returns the key that the store of `data_dir` made at its first start, if there is one."""
    try:
        return (data_dir / "admin.key").read_text().strip()
    except OSError:
        return None


def inherited_environment() -> dict[str, str]:
    """Returns a copy of this process's environment, for child processes."""
    return dict(os.environ)  # noqa: TID251  (children inherit what the person set, and more)
