"""Shares the work of a kernel among as many threads as torch has; kernels let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

_WORTH: Final = 1e6
"""Multiplications below which handing a part of a call to another thread takes longer than computing it."""


def share(work: NDArray[Any], run: Callable[[int, slice], None]) -> None:
    """Call `run` with a thread's number and its part of some pieces; `work` up to each is in multiplications."""
    parts = min(torch.get_num_threads(), len(work), int(work[-1] // _WORTH) + 1)
    if parts == 1:
        run(0, slice(0, len(work)))
        return
    edges = [0, *(int(np.searchsorted(work, work[-1] * part / parts)) + 1 for part in range(1, parts)), len(work)]
    first, *others = [slice(start, stop) for start, stop in pairwise(edges) if start < stop]
    running = [_pool().submit(run, thread, cut) for thread, cut in enumerate(others, start=1)]
    run(0, first)
    for part in running:
        part.result()


def share_rows(rows: int, work: int, run: Callable[[int, int], None]) -> None:
    """Call `run` with the first of some rows and their number, for parts of `rows`; `work` is that of a row."""
    parts = min(torch.get_num_threads(), rows * work // int(_WORTH) + 1)
    if parts == 1:
        run(0, rows)
        return
    edges = [rows * part // parts for part in range(parts + 1)]
    running = [_pool().submit(run, start, stop - start) for start, stop in pairwise(edges[1:])]
    run(0, edges[1])
    for part in running:
        part.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="kernel")
