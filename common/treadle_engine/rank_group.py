"""The processes that torchrun started over one base: who they are, and how rank 0 tells the others what to do.

Rank 0 decides and the others follow: they hear commands, do the same with replicas of its state, and answer how it
went. Tensors of the base move over `shard`; commands, answers and adapters over lines of their own, so that what waits
on one does not hold up another. A rank that dies breaks every connection to it, one that hangs runs into the timeout:
either way the group is lost, and must be started again as a whole. Knows nothing of bases, trainers and samplers.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Final, TypeVar, cast

import torch
import torch.distributed as dist
import xxhash
from pydantic_settings import BaseSettings
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from treadle_engine.base_model import BaseInfo
from treadle_engine.shards import GroupLostError, Shard, guarded

T = TypeVar("T")

_LOADING: Final = timedelta(minutes=30)
"""How long ranks wait for each other while they load, which takes each as long as its disk does."""


class Launch(BaseSettings):
    """What torchrun tells each process that it starts; of a process that was started otherwise, that it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    torchelastic_restart_count: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks."""
        return self.world_size == 1


class Line:
    """Commands of rank 0, heard by all others in the same order. One thread of each rank uses it."""

    def __init__(self, timeout: timedelta, *, on_cuda: bool) -> None:
        """Connect all ranks; each must make its lines in the same order."""
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        self._group = cast(dist.ProcessGroup, dist.new_group(backend=backend, timeout=timeout))

    def share(self, value: T | None = None) -> T:
        """Return rank 0's value on every rank; GroupLostError."""
        held = [value]
        guarded(dist.broadcast_object_list, held, src=0, group=self._group, device=torch.device("cpu"))
        return cast(T, held[0])

    def copy_(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor by rank 0's, which has the same shape; GroupLostError."""
        guarded(dist.broadcast, tensor, src=0, group=self._group)
        return tensor

    def agree(self, outcome: bytes) -> None:
        """Wait until all ranks are here; GroupLostError unless they all have the same outcome."""
        mine = torch.frombuffer(bytearray(xxhash.xxh3_128_digest(outcome)), dtype=torch.uint8)
        all_SB = mine.new_empty(dist.get_world_size(), len(mine))
        guarded(dist.all_gather_single, all_SB.view(-1), mine, group=self._group)
        others = [number for number, theirs in enumerate(all_SB) if not torch.equal(theirs, all_SB[0])]
        if others:
            raise GroupLostError(f"rank 0 and {others} differ: they need the same settings, base and hardware")


class RankGroup:
    """This process among those that torchrun started."""

    def __init__(self, device: str, timeout_seconds: float) -> None:
        """Meet the others; a rank that does not answer for so long is lost."""
        timeout = timedelta(seconds=timeout_seconds)
        launch = Launch()
        self.on_one_host = launch.local_world_size == launch.world_size
        """Whether all ranks see the same files."""
        on_cuda = torch.device(device).type == "cuda"
        self.device = f"cuda:{launch.local_rank}" if on_cuda else device
        """Where this rank's part of the base goes."""
        if on_cuda:
            torch.cuda.set_device(launch.local_rank)
        guarded(self._connect, "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout, launch.torchelastic_restart_count)
        meeting = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_LOADING))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.shard = Shard(self.rank, self.size, meeting)
        self.main, self.beside = Line(timeout, on_cuda=on_cuda), Line(timeout, on_cuda=on_cuda)

    def check_alike(self, info: BaseInfo, *settings: object) -> None:
        """Raise GroupLostError unless all ranks have the same base, whose files may lie elsewhere, and settings."""
        self.main.agree(repr((replace(info, path=""), settings)).encode())

    @staticmethod
    def _connect(backend: str, timeout: timedelta, attempt: int) -> None:
        """Make torch's default group, under keys of this start: torchrun's store still has those of the one before."""
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)

    @staticmethod
    def leave() -> None:
        """Close the connections, which all ranks do."""
        if dist.is_initialized():
            dist.destroy_process_group()
