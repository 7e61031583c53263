"""Chunks of one operation that are computed apart: each is added once and in order, however its results arrive."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treadle_engine.batch import TokenBatch
from treadle_engine.losses import LossSpec
from treadle_engine.passes import ChunkResult
from treadle_trainer.operations import PassWork


def work_of(num_chunks: int) -> PassWork:
    """Returns an operation of chunks of one token."""
    one = np.zeros(1, np.int32)
    chunks = [TokenBatch(np.ones(1, np.int64), one, one) for _ in range(num_chunks)]
    return PassWork(chunks, LossSpec("cross_entropy"), False, False)


def result_of(index: int) -> ChunkResult:
    """Returns a result that tells which chunk it is of."""
    return ChunkResult(np.zeros(1, np.float32), float(index), gradient=np.full(1, index, np.float32))


@given(
    num_chunks=st.integers(1, 8),
    arrivals=st.lists(st.integers(0, 7), max_size=30),
    adds=st.lists(st.booleans(), max_size=30),
)
def test_results_are_added_once_and_in_order(num_chunks: int, arrivals: list[int], adds: list[bool]) -> None:
    """Repeats change nothing, gaps hold back what is behind them, and every chunk is waiting, taken, come or added."""
    work, added, seen = work_of(num_chunks), [], set()
    for step, index in enumerate(number for number in arrivals if number < num_chunks):
        work.taken.add(index)
        assert index not in set(work.waiting)
        assert work.deliver(index, result_of(index)) == (index not in seen)
        seen.add(index)
        assert set(work.waiting) == set(range(num_chunks)) - seen
        if step < len(adds) and adds[step]:
            ready = work.next_arrived()
            added += [float(result.gradient[0]) for result in ready if result.gradient is not None]
            work.add(ready)
    ready = work.next_arrived()
    added += [float(result.gradient[0]) for result in ready if result.gradient is not None]
    work.add(ready)
    gap = next((index for index in range(num_chunks) if index not in seen), num_chunks)
    assert added == [float(index) for index in range(gap)]
    assert [result.loss_sum for result in work.results] == added
    assert work.complete == (gap == num_chunks)
    assert all(result.gradient is None for result in work.results)
