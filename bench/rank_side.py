"""One rank of `bench.ranks`: holds a base in one of the ways that are compared, times passes and decoding steps.

Started by torchrun, or alone; rank 0 prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from treadle_engine import bases
from treadle_engine.attention import PackedCausal
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.decode_base import DecodeBase
from treadle_engine.determinism import settle
from treadle_engine.loading import find_layers
from treadle_engine.lora import AdapterWeights, LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import TrainState
from treadle_engine.passes import Chunk, TrainingEngine
from treadle_engine.rank_group import Launch, RankGroup

DECODING_ROWS: Final = 16
WAYS: Final = ("columns", "fsdp", "fsdp data parallel")


def hold(way: str, kind: type[BaseModel], options: argparse.Namespace, group: RankGroup | None) -> BaseModel:
    """Loads the base: its columns spread over the ranks, or its layers by torch's own FSDP2."""
    path, name = bases.resolve(options.base, Path("~/.cache/treadle").expanduser(), options.dtype)
    shard = group.shard if group is not None and way == "columns" else None
    base = kind.load(path, name=name, dtype=options.dtype, shard=shard)
    if options.generic or way != "columns":
        base.lean = None
    if way != "columns" and group is not None:
        # Embedding and unembedding are used outside of any module's forward, where FSDP2 does not gather them.
        for layer in find_layers(base.model.get_decoder()):
            fully_shard(layer, reshard_after_forward=True)
    return base


def gathered_bytes(base: BaseModel) -> int:
    """Returns the bytes that this rank gets from the others whenever all of the base is gathered once."""
    sharded = [parameter for parameter in base.model.parameters() if hasattr(parameter, "_local_tensor")]
    return sum(parameter.nbytes - parameter._local_tensor.nbytes for parameter in sharded)


def held_bytes(base: BaseModel) -> int:
    """Returns the bytes of weights that this rank keeps between passes."""
    unique = {id(parameter): parameter for parameter in base.model.parameters()}
    local = [getattr(parameter, "_local_tensor", parameter) for parameter in unique.values()]
    return sum(tensor.nbytes for tensor in local)


def batch_of(count: int, length: int, vocab: int) -> TokenBatch:
    """Returns made-up sequences."""
    total = count * length
    tokens = (np.arange(total) * 7919 % (vocab - 3) + 3).astype(np.int32)
    weights = {"weights": np.ones(total, dtype=np.float32)}
    return TokenBatch(np.full(count, length, dtype=np.int64), tokens, tokens, weights)


def a_pass(way: str, base: BaseModel, sequences: int, group: RankGroup | None) -> Callable[[], None]:
    """Returns what makes one pass of forward and backward over some sequences of 128 tokens."""
    engine, state = TrainingEngine(base), TrainState.fresh(AdapterWeights.init(base, LoraConfig(rank=16)))
    size = 1 if group is None else group.size
    mine = sequences // size if way == "fsdp data parallel" else sequences
    batch = batch_of(mine, 128, base.info.vocab_size)

    def run() -> None:
        engine.run_pass([Chunk(state, piece, LossSpec("cross_entropy")) for piece in engine.split(batch)])
        if way == "fsdp data parallel" and size > 1:
            dist.all_reduce(state.grads)

    return run


def a_decoding_step(base: DecodeBase) -> Callable[[], None]:
    """Returns what runs the base over one row of each of some sequences, without what decoding adds to it."""
    tokens_T = torch.arange(3, 3 + DECODING_ROWS)
    positions_T = torch.zeros(DECODING_ROWS, dtype=torch.int64)
    plan = PackedCausal([1] * DECODING_ROWS, base.device)

    @torch.no_grad()
    def run() -> None:
        base.logits(base.hidden(tokens_T, positions_T, plan, base.adapters(())), base.adapters(()))

    return run


@contextmanager
def counted() -> Any:  # a context of the list that it fills
    """Counts the bytes that collectives of the base bring to this rank."""
    received = [0]
    gather, reduce = dist.all_gather_single, dist.all_reduce

    def gathering(output: torch.Tensor, part: torch.Tensor, **kwargs: Any) -> Any:
        received[0] += output.nbytes - part.nbytes
        return gather(output, part, **kwargs)

    def reducing(x: torch.Tensor, **kwargs: Any) -> Any:
        received[0] += 2 * x.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        return reduce(x, **kwargs)

    dist.all_gather_single, dist.all_reduce = gathering, reducing
    try:
        yield received
    finally:
        dist.all_gather_single, dist.all_reduce = gather, reduce


def timed(run: Callable[[], None], rounds: int) -> dict[str, float]:
    """Returns the medians of wall and CPU milliseconds, and the megabytes that the base's own collectives received."""
    run()
    with counted() as received:
        run()
    wall, cpu = [], []
    for _ in range(rounds):
        if dist.is_initialized():
            dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        run()
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - used))
    return {"wall": median(wall), "cpu": median(cpu), "megabytes": received[0] / 1e6}


def main() -> None:
    """Measures one way on this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--base", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--generic", action="store_true")
    options = parser.parse_args()
    settle(options.threads)
    group = None if Launch().is_alone else RankGroup("cpu", 600.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    base = hold(options.way, BaseModel, options, group)
    found: dict[str, Any] = {
        "weights": held_bytes(base),
        "gathered": gathered_bytes(base),
        "loading": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }
    for sequences in (2, 8):
        found[f"pass {sequences}"] = timed(a_pass(options.way, base, sequences, group), options.rounds)
    decoding = hold(options.way, DecodeBase, options, group)
    assert isinstance(decoding, DecodeBase)
    if options.way == "columns":
        decoding.prepack()
    decoding.compile()
    found["decode"] = timed(a_decoding_step(decoding), options.rounds * 3)
    if group is None or group.rank == 0:
        print(json.dumps(found), flush=True)
    RankGroup.leave()


if __name__ == "__main__":
    main()
