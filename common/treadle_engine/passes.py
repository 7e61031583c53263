"""Forward and backward of many runs' chunks in one pass over the base.

The engine packs chunks into one stream, gets log-probs tile by tile, lets each chunk's loss answer with a
derivative, and runs one backward. It does not know tenants, queues, quotas or the order of ops: whoever calls it
decides which chunks share a pass, and by construction that choice changes no bit of any result.
"""

# Shape suffix legend
#   T = packed tokens of the pass, t = tokens of one chunk, N = positions of a chunk with a target
#   K = targets per position, D = hidden

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle_engine.attention import PackedCausal
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import IGNORE, TokenBatch
from treadle_engine.errors import EngineError
from treadle_engine.half_segments import prepare_products
from treadle_engine.logprobs import Derivative, HeadChunk, run_head
from treadle_engine.lora import AdapterWeights, Segment, Segments
from treadle_engine.losses import LossSpec, evaluate
from treadle_engine.memory import Gradients, is_out_of_memory
from treadle_engine.optim import TrainState

CHUNK_TOKENS = 1024
"""Target size of a chunk. A constant, not a setting: where an op is cut decides the last bits of its gradient."""

_CPU_STREAM_TOKENS = 1536
"""On a CPU a longer stream is no faster: it only needs more memory, which the allocator then faults in again.

Shorter ones pay for their calls: with 1024 tokens, often one chunk and a gap, 16 tenants took 5 to 10 % longer.
"""


@dataclass
class Chunk:
    """A slice of one op: whose adapter, which sequences, which loss, and whether a gradient is wanted."""

    state: TrainState
    batch: TokenBatch
    loss: LossSpec
    forward_only: bool = False


@dataclass
class ChunkResult:
    """Log-probs in the shape of the targets (0 where the target is -1), the loss sum and metrics.

    If `error` is set, no other field counts, and the gradient of the chunk's run may be incomplete: drop it.
    """

    logprobs_TK: NDArray[np.float32]
    loss_sum: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    error: EngineError | None = None
    gradient: NDArray[np.float32] | None = None
    """Of a chunk that was computed apart: what it adds to its run's gradient, flat."""


class TrainingEngine:
    """Runs passes on one base; one thread owns it."""

    def __init__(self, base: BaseModel, max_tokens_per_pass: int = 4096) -> None:
        """Serve `base` with at most so many tokens in one pass."""
        if max_tokens_per_pass < CHUNK_TOKENS:
            raise EngineError("BAD_VALUE", f"max_tokens_per_pass must be at least {CHUNK_TOKENS}")
        self.base = base
        self.max_tokens_per_pass = max_tokens_per_pass
        prepare_products(base.dtype, base.device, base.sites)

    def split(self, batch: TokenBatch, *, limited: bool = True) -> list[TokenBatch]:
        """Cut a batch into chunks at datum boundaries, by its own lengths alone.

        SEQUENCE_TOO_LONG if a datum fits no pass, unless it is not `limited`: such a chunk needs a pass of its own.
        """
        longest = int(batch.lengths_R.argmax())
        if limited and int(batch.lengths_R[longest]) > self.max_tokens_per_pass:
            raise EngineError(
                "SEQUENCE_TOO_LONG",
                f"datum {longest} has {int(batch.lengths_R[longest])} tokens, "
                f"this trainer takes at most {self.max_tokens_per_pass} in a pass",
            )
        pieces, start, used = [], 0, 0
        for row, length in enumerate(batch.lengths_R.tolist()):
            if used and used + length > CHUNK_TOKENS:
                pieces.append(batch.rows(start, row))
                start, used = row, 0
            used += length
        pieces.append(batch.rows(start, batch.num_rows))
        return pieces

    @staticmethod
    def apart(weights: AdapterWeights) -> TrainState:
        """Return a state for one chunk whose gradient is not to be added to its run's yet; it cannot be stepped."""
        nothing = torch.empty(0)
        return TrainState(weights, torch.zeros_like(weights.flat), nothing, nothing)

    def run_pass(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """Compute all chunks, each as if it were alone, and add their gradients in the order given.

        Chunks without a gradient go through the base apart from the others: they need no graph. Where memory does not
        suffice, fewer chunks go through at once; only one that does not fit alone gets OUT_OF_MEMORY.
        """
        total = sum(chunk.batch.num_tokens for chunk in chunks)
        if total > self.max_tokens_per_pass and len(chunks) > 1:
            raise EngineError("SEQUENCE_TOO_LONG", f"{total} tokens in a pass of at most {self.max_tokens_per_pass}")
        works = [_Work(chunk, self.base.device) for chunk in chunks]
        for forward_only in (True, False):
            group = [work for work in works if work.chunk.forward_only is forward_only]
            for stream in self._streams(group):
                self._run_stream(stream, with_grad=not forward_only)
        return [work.result() for work in works]

    def _streams(self, works: Sequence[_Work]) -> Iterator[list[_Work]]:
        """Cut a pass, in order, into streams that go through the base one after the other; no bit depends on it."""
        limit = _CPU_STREAM_TOKENS if self.base.device.type == "cpu" else self.max_tokens_per_pass
        stream: list[_Work] = []
        used = 0
        for work in works:
            if stream and used + work.chunk.batch.num_tokens > limit:
                yield stream
                stream, used = [], 0
            stream.append(work)
            used += work.chunk.batch.num_tokens
        if stream:
            yield stream

    def _run_stream(self, works: Sequence[_Work], with_grad: bool) -> None:
        """Run a group; after a failed allocation undo it and run its halves, down to single chunks."""
        gradients: Gradients | None = None
        try:
            gradients = Gradients([work.chunk.state for work in works]) if with_grad else None
            self._run_group(works, gradients)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Behind the handler: its traceback kept every tensor of the attempt alive.
        if gradients is not None:
            gradients.undo()
        gradients = None
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.base.shard is not None:
            # Ranks must go on alike: where only some failed, the others wait elsewhere, and the group is lost.
            self.base.shard.meet()
        if len(works) == 1:
            works[0].fail_for_memory(reason)
            return
        middle = len(works) // 2
        for half in (works[:middle], works[middle:]):
            self._run_stream(half, with_grad)

    def _run_group(self, works: Sequence[_Work], gradients: Gradients | None) -> None:
        device, with_grad = self.base.device, gradients is not None
        tokens = np.concatenate([work.chunk.batch.tokens_T for work in works])
        positions = np.concatenate([work.chunk.batch.positions_T() for work in works])
        lengths = np.concatenate([work.chunk.batch.lengths_R for work in works]).tolist()
        segments, start = [], 0
        for work in works:
            segments.append(work.place(start, gradients is None or gradients.begin(work.chunk.state)))
            start = work.segment.stop
        with torch.set_grad_enabled(with_grad):
            x_TD = self.base.hidden(
                torch.from_numpy(tokens.astype(np.int64)).to(device),
                torch.from_numpy(positions).to(device),
                PackedCausal(lengths, device),
                Segments(segments),
            )
        with torch.no_grad():
            fixed_TD = x_TD.detach()
            g_TD = torch.zeros_like(fixed_TD) if with_grad else None
            # A loss that couples positions must see all its log-probs before it has a derivative: two sweeps.
            coupled = [work.head(work.collect) for work in works if not work.chunk.loss.elementwise]
            run_head(self.base, fixed_TD, coupled, None)
            run_head(self.base, fixed_TD, [work.head(work.derive) for work in works], g_TD)
        if g_TD is None:
            return
        for work in works:
            if work.error is not None:
                # Mute the chunk: what it says from here on is worthless, and none of it may be added.
                g_TD[work.segment.start : work.segment.stop] = 0.0
                work.segment.grads = None
        if any(work.error is None for work in works):
            torch.autograd.backward(x_TD, g_TD)


class _Work:
    """One chunk in a pass: its tensors and what has been learned about it so far."""

    def __init__(self, chunk: Chunk, device: torch.device) -> None:
        self.chunk = chunk
        self.error: EngineError | None = None
        batch = chunk.batch
        targets_tK = torch.from_numpy(batch.targets_TK.reshape(batch.num_tokens, -1).astype(np.int64))
        self._mask_tK = targets_tK != IGNORE
        self._rows_N = self._mask_tK.any(dim=1).nonzero()[:, 0]
        self._targets_NK = targets_tK[self._rows_N].to(device)
        self._present_NK = self._mask_tK[self._rows_N].to(device)
        columns = dict(batch.columns)
        if chunk.loss.name == "cross_entropy" and "weights" not in columns:
            columns["weights"] = np.zeros(batch.targets_TK.shape, dtype=np.float32)
        self._columns = {
            name: torch.from_numpy(np.ascontiguousarray(column)).view(batch.num_tokens, -1)[self._rows_N].to(device)
            for name, column in columns.items()
        }
        self._sequence_N = torch.repeat_interleave(torch.from_numpy(batch.lengths_R))[self._rows_N].to(device)
        self._logprobs_NK = torch.zeros(self._targets_NK.shape, dtype=torch.float32, device=device)
        self._values_NK = torch.zeros_like(self._logprobs_NK)
        self._gradient_NK: Tensor | None = None
        self._stream_N = self._rows_N
        self.segment = Segment(0, 0, chunk.state.weights)

    def place(self, start: int, fresh: bool) -> Segment:
        """Give the chunk its rows in the stream; what an earlier attempt found does not count.

        `fresh`: no chunk before it has added to its run's gradient.
        """
        self.error = None
        grads = None if self.chunk.forward_only else self.chunk.state.grads
        self.segment = Segment(start, start + self.chunk.batch.num_tokens, self.chunk.state.weights, grads, fresh)
        self._stream_N = (self._rows_N + start).to(self._targets_NK.device)
        return self.segment

    def fail_for_memory(self, reason: str) -> None:
        """Give up: not even alone did the chunk fit."""
        lengths_R = self.chunk.batch.lengths_R
        self.error = EngineError(
            "OUT_OF_MEMORY",
            f"{int(lengths_R.sum())} tokens in {len(lengths_R)} sequences of at most {int(lengths_R.max())} do not fit "
            f"into the memory of this trainer, even alone; send shorter sequences ({reason[:200]})",
        )

    def head(self, derivative: Derivative) -> HeadChunk:
        """Describe the chunk to the head."""
        return HeadChunk(self._stream_N, self._targets_NK, self.segment, derivative)

    def collect(self, rows: slice, logprobs_NK: Tensor) -> None:
        """Keep log-probs; once they are complete, evaluate a loss that couples positions."""
        self._logprobs_NK[rows] = logprobs_NK
        if rows.stop == self._rows_N.shape[0]:
            spec = self.chunk.loss
            columns = {name: column[:, 0] for name, column in self._columns.items()}
            result = evaluate(spec, self._logprobs_NK[:, 0], columns, self._sequence_N)
            self._values_NK = result.values[:, None]
            self._gradient_NK = result.gradient[:, None]

    def derive(self, rows: slice, logprobs_NK: Tensor) -> Tensor | None:
        """Keep log-probs and return dLoss/dlogprob for these rows; None when there is nothing to propagate."""
        present_NK = self._present_NK[rows]
        self._logprobs_NK[rows] = logprobs_NK
        if self._gradient_NK is not None:
            gradient_NK = self._gradient_NK[rows]
        else:
            columns = {name: column[rows] for name, column in self._columns.items()}
            result = evaluate(self.chunk.loss, logprobs_NK, columns)
            self._values_NK[rows] = result.values.masked_fill(~present_NK, 0.0)
            gradient_NK = result.gradient.masked_fill(~present_NK, 0.0)
        finite = logprobs_NK.masked_fill(~present_NK, 0.0).isfinite().all() & gradient_NK.isfinite().all()
        if not bool(finite) and self.error is None:
            self.error = EngineError("NAN_GRADIENT", "a log-probability or its loss is not finite")
        return None if self.error is not None or self.chunk.forward_only else gradient_NK

    def result(self) -> ChunkResult:
        """Return what the caller gets."""
        batch = self.chunk.batch
        logprobs_tK = torch.zeros(self._mask_tK.shape, dtype=torch.float32)
        logprobs_tK[self._rows_N] = self._logprobs_NK.masked_fill(~self._present_NK, 0.0).cpu()
        loss_sum = float(self._values_NK.sum(dtype=torch.float64))
        if self.error is None and not math.isfinite(loss_sum):
            self.error = EngineError("NAN_GRADIENT", "the loss is not finite")
        metrics = {"loss:sum": loss_sum, "num_targets:sum": float(self._mask_tK.sum())}
        return ChunkResult(logprobs_tK.numpy().reshape(batch.targets_TK.shape), loss_sum, metrics, self.error)
