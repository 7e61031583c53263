"""One rank's part of a base that is spread over several, and how the ranks make whole results of their parts.

Every linear and the embedding are cut by rows of their weight, that is by output features (tensor parallelism by
columns, Shoeybi et al. 2019, arXiv:1909.08053, with the outputs gathered). A rank multiplies with its own rows; the
outputs of all are put side by side, so that everything else (adapters, attention, norms, losses) is the same on every
rank, whatever the architecture and its number of heads. Only the gradient of a linear's input is a sum over ranks.
All ranks must make the same calls in the same order; one that is gone or hangs is a GroupLostError on the others. Knows
nothing of models and commands.
"""

# Shape suffix legend
#   M = rows of the stream, C = columns (output features) that one rank has, O = output features, D = hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

COLUMN_MULTIPLE = 16
"""A rank's columns are a multiple of this: fewer, and a CPU's BLAS picks another kernel, which rounds otherwise."""


class GroupLostError(RuntimeError):
    """A rank is gone, hangs, or has another state than the others: this process is of no use without them."""


def guarded(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:  # Any: what torch's collectives take
    """Call a collective; GroupLostError if a rank does not take part."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        raise GroupLostError(f"a rank does not answer: {str(error).splitlines()[0]}") from error


class Shard:
    """Which rows of a weight this rank has, and the collectives over the group of all ranks."""

    def __init__(self, rank: int, size: int, meeting: dist.ProcessGroup | None = None) -> None:
        """Be rank `rank` of `size`; tensors move over torch's default group, and `meeting` is where ranks wait."""
        self.rank, self.size = rank, size
        self._meeting = meeting

    def width(self, total: int) -> int:
        """Return how many of `total` rows each rank has room for; the last ranks may have fewer of their own."""
        return -(-total // (self.size * COLUMN_MULTIPLE)) * COLUMN_MULTIPLE

    def own(self, total: int) -> slice:
        """Return which of `total` rows are this rank's; may be empty."""
        width = self.width(total)
        return slice(min(self.rank * width, total), min((self.rank + 1) * width, total))

    def gather(self, parts: Sequence[Tensor], totals: Sequence[int]) -> list[Tensor]:
        """Return whole y_MO of each of some linears, with `totals` columns, from every rank's y_MC; one collective."""
        part_MC = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        rows, columns = part_MC.shape
        all_SMC = part_MC.new_empty(self.size, rows, columns)
        guarded(dist.all_gather_single, all_SMC.view(-1, columns), part_MC.contiguous())
        wholes, start = [], 0
        for part, total in zip(parts, totals, strict=True):
            stop = start + part.shape[1]
            y_MO = all_SMC[:, :, start:stop].transpose(0, 1).reshape(rows, -1)
            wholes.append(y_MO if y_MO.shape[1] == total else y_MO[:, :total].contiguous())
            start = stop
        return wholes

    def sum_(self, x: Tensor) -> Tensor:
        """Add up, in place, what all ranks have; the result has the same bits on every rank."""
        guarded(dist.all_reduce, x)
        return x

    def meet(self) -> None:
        """Wait until all ranks are here."""
        guarded(dist.barrier, group=self._meeting)


class ShardedEmbedding(nn.Module):
    """An embedding of which each rank has some rows; wraps the architecture's own, which may scale what it finds."""

    def __init__(self, embedding: nn.Embedding, shard: Shard) -> None:
        """Look up in `embedding`, whose weight holds this rank's rows, padded."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self._embedding, self._shard = embedding, shard
        embedding.padding_idx = None  # an index into the whole; only gradients, of which there are none, ask for it

    @property
    def weight(self) -> Tensor:
        """This rank's rows."""
        return self._embedding.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding gives it
        """Return x_[..., D] of token ids: each from the rank that has its row, zeros from all others."""
        own = self._shard.own(self.num_embeddings)
        mine = (input >= own.start) & (input < own.stop)
        x: Tensor = self._embedding((input - own.start).clamp(0, max(0, own.stop - own.start - 1)))
        return self._shard.sum_(x.masked_fill_(~mine.unsqueeze(-1), 0.0))


def cut(weight_OX: Tensor, shard: Shard) -> Tensor:
    """Return this rank's rows of a weight or bias, filled up with zeros to the width that all ranks have.

    Rows that need no filling are a view, so that what is mapped from a file stays mapped.
    """
    own = shard.own(weight_OX.shape[0])
    missing = shard.width(weight_OX.shape[0]) - (own.stop - own.start)
    part_CX = weight_OX[own]
    return part_CX if not missing else F.pad(part_CX, (0, 0) * (weight_OX.dim() - 1) + (0, missing))
