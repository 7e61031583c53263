"""How much memory this process may use. Knows nothing of what for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


def host_memory(limit_file: Path = _CGROUP_LIMIT) -> int:
    """Returns the machine's memory in bytes, or the container's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = limit_file.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical
