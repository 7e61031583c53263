"""Shares work among as many threads as torch has, by calls that let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, TypeVarTuple

import numpy as np
import torch
from numpy.typing import NDArray

Arguments = TypeVarTuple("Arguments")

_WORTH: Final = 1e6
"""Multiplications below which handing a part of a call to another thread takes longer than computing it."""


def together(run: Callable[[*Arguments], object], calls: Sequence[tuple[*Arguments]]) -> None:
    """Call `run` with each of some arguments, the first here, the others on threads of their own."""
    first, *others = calls
    running = [_pool(torch.get_num_threads() - 1).submit(run, *arguments) for arguments in others]
    run(*first)
    for call in running:
        call.result()


def share(work: NDArray[Any], run: Callable[[int, slice], None]) -> None:
    """Call `run` with a thread's number and its part of some pieces; `work` up to each is in multiplications."""
    parts = min(torch.get_num_threads(), len(work), int(work[-1] // _WORTH) + 1)
    if parts == 1:
        run(0, slice(0, len(work)))
        return
    cuts = (int(np.searchsorted(work, work[-1] * part / parts)) + 1 for part in range(1, parts))
    pieces = [slice(start, stop) for start, stop in pairwise([0, *cuts, len(work)]) if start < stop]
    together(run, list(enumerate(pieces)))


def share_rows(rows: int, work: int, run: Callable[[int, int], None]) -> None:
    """Call `run` with the first of some rows and their number, for parts of `rows`; `work` is that of a row."""
    parts = min(torch.get_num_threads(), rows * work // int(_WORTH) + 1)
    edges = [rows * part // parts for part in range(parts + 1)]
    together(run, [(start, stop - start) for start, stop in pairwise(edges)])


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")
