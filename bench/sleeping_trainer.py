"""A trainer whose passes sleep instead of computing: for benchmarks of what is around them, where cores are lacking.

Everything but the pass is real: the base is loaded, chunks travel, gradients of the real size come back and are added.
A chunk sleeps `BENCH_SECONDS_PER_TOKEN` a position, which the benchmark measured with real passes; what it gives is no
result of anything. Never part of a deployment: it is started by a benchmark, as a module of the benchmarks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from treadle_engine.passes import ChunkResult
from treadle_trainer import __main__ as trainer_main
from treadle_trainer.device import Device, PassChunk


def sleep_through(device: Device, chunks: Sequence[PassChunk]) -> list[ChunkResult]:
    """Stands in for `Device.run_pass`."""
    time.sleep(float(os.environ["BENCH_SECONDS_PER_TOKEN"]) * sum(chunk.batch.num_tokens for chunk in chunks))
    results = []
    for chunk in chunks:
        result = ChunkResult(np.zeros(chunk.batch.targets_TK.shape, np.float32), 0.0, {"loss:sum": 0.0})
        if chunk.apart and not chunk.forward_only:
            result.gradient = device.apart(chunk.run).grads.add_(1e-3).cpu().numpy()
        results.append(result)
    return results


if __name__ == "__main__":
    Device.run_pass = sleep_through  # type: ignore[method-assign]  # The whole point.
    trainer_main.main()
