"""Freed memory is kept for the next pass: measured by the pages that the system has to bring."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from treadle_engine.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    blocks = [torch.ones(2**20) for _ in range(4)]
    del blocks

work()
before = faults()
for _ in range(10):
    work()
print(faults() - before)
"""

PAGES = 10 * 4 * 2**22 // 4096
"""What ten rounds write to."""


THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""What glibc begins with; without these it raises them when it happens to see large blocks freed, as on import."""


def count(how: str) -> int:
    """Return the page faults of the rounds after the first, in a process of their own."""
    command, environment = [sys.executable, "-c", PROGRAM, how], {**os.environ, **THRESHOLDS}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_memory_of_a_pass_serves_the_next() -> None:
    """Left alone, the allocator gives blocks of megabytes back; told to keep them, it asks for a fraction of them."""
    assert count("keep") < PAGES // 3 < PAGES // 2 < count("leave")
