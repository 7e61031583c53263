"""Operations between the wire and the device: arguments checked and decoded, answers encoded.

Whatever is wrong with an operation's arguments is found here, before it could share a pass with anybody else's.
Pure: no I/O, no torch calls; batches are numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import xxhash
from google.protobuf.message import Message
from numpy.typing import NDArray

from treadle.errors import TreadleError, make_error
from treadle.v1 import admin_pb2, training_pb2, types_pb2
from treadle.wire import decode_batch, encode_outputs
from treadle_engine.batch import BaseLimits, TokenBatch
from treadle_engine.errors import EngineError
from treadle_engine.lora import LoraConfig
from treadle_engine.losses import LossSpec
from treadle_engine.optim import AdamParams
from treadle_engine.passes import ChunkResult
from treadle_trainer.budget import PassCost
from treadle_trainer.runs import BATCHED, FORWARD

MAX_ANSWER_BYTES: Final = 2_500_000
"""Longest answer: it must fit a journal write and a frame of the stream."""

DIGEST_BYTES: Final = 16
RANK_BYTES: Final = 2
"""Bytes of a state digest proper, and of the number of ranks that stands behind it if several computed the state."""

FloatArray = NDArray[np.float32]
Split = Callable[[TokenBatch], list[TokenBatch]]


@dataclass(slots=True)
class PassWork:
    """A forward or forward_backward, cut into chunks, and how far it has come."""

    chunks: list[TokenBatch]
    loss: LossSpec
    forward_only: bool
    as_list: bool
    results: list[ChunkResult] = field(default_factory=list)
    """Of the first chunks: those whose gradient is in the run's."""
    arrived: dict[int, ChunkResult] = field(default_factory=dict)
    """Of chunks that were computed apart and are not added yet, by index."""
    taken: set[int] = field(default_factory=set)
    """Chunks that are being computed apart, here or elsewhere."""
    kept: set[int] = field(default_factory=set)
    """Chunks that are computed here, since they could not be elsewhere."""
    ran_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Positions that have passed over the base."""
        return sum(chunk.num_tokens for chunk in self.chunks[: len(self.results)])

    @property
    def complete(self) -> bool:
        """Whether all chunks have their result."""
        return len(self.results) == len(self.chunks)

    @property
    def waiting(self) -> Iterator[int]:
        """Chunks that nobody computes yet, in order."""
        rest = range(len(self.results), len(self.chunks))
        return (index for index in rest if index not in self.taken and index not in self.arrived)

    def deliver(self, index: int, result: ChunkResult) -> bool:
        """Takes what a chunk computed apart gave; returns whether it had not come before."""
        self.taken.discard(index)
        if index < len(self.results) or index in self.arrived:
            return False
        self.arrived[index] = result
        return True

    def next_arrived(self) -> list[ChunkResult]:
        """Returns the results that follow those that are in the run's gradient, without a gap."""
        ready: list[ChunkResult] = []
        while (result := self.arrived.get(len(self.results) + len(ready))) is not None:
            ready.append(result)
        return ready

    def add(self, added: Sequence[ChunkResult]) -> None:
        """Notes that the next results' gradients have been added; they are not kept."""
        for result in added:
            del self.arrived[len(self.results)]
            result.gradient = None
            self.results.append(result)


def kind_of(operation: training_pb2.Operation) -> str:
    """Returns the name of the operation's kind; BAD_OPERATION if it has none."""
    kind: str | None = operation.WhichOneof("kind")
    if kind is None:
        raise make_error(
            "BAD_OPERATION", "the operation has no kind; set one of forward, forward_backward, optim_step, ..."
        )
    return kind


def differ(digest: bytes, recorded: bytes) -> bool:
    """Tells whether two state digests say that the states differ: not if one is missing or came of other ranks."""
    if digest == recorded or not digest or not recorded:
        return False
    of_other_ranks = digest[DIGEST_BYTES:] != recorded[DIGEST_BYTES:]
    return not (of_other_ranks and {len(digest), len(recorded)} <= {DIGEST_BYTES, DIGEST_BYTES + RANK_BYTES})


def digest_of(operation: training_pb2.Operation) -> int:
    """Returns the digest that the client gave, or computes it: xxh3-64 of the serialized kind."""
    kind = operation.WhichOneof("kind")
    if operation.digest or kind is None:
        return operation.digest
    body: Message = getattr(operation, kind)
    return xxhash.xxh3_64_intdigest(body.SerializeToString(deterministic=True))


def count_tokens(operation: training_pb2.Operation) -> int:
    """Returns how many positions an operation passes over the base, before its batch has been checked; 0 for none."""
    kind = operation.WhichOneof("kind")
    if kind not in BATCHED:
        return 0
    batch: types_pb2.Batch = getattr(operation, kind).batch
    if batch.WhichOneof("form") == "list":
        return sum(len(datum.tokens) for datum in batch.list.data)
    lengths = batch.packed.lengths
    rows_R = np.frombuffer(lengths[: len(lengths) // 4 * 4], dtype="<u4").astype(np.int64)
    # Lengths that lie are refused when the batch is decoded.
    return max(0, int(rows_R.sum()) - batch.packed.targets_shifted * len(rows_R))


def timeout_of(operation: training_pb2.Operation) -> float | None:
    """Returns the operation's queue timeout in seconds, None for none."""
    return operation.queue_timeout.ToNanoseconds() / 1e9 if operation.HasField("queue_timeout") else None


def prepare(operation: training_pb2.Operation, limits: BaseLimits, split: Split) -> PassWork:
    """Decodes, checks and cuts the batch of a forward or forward_backward; raises TreadleError if it cannot run."""
    kind = kind_of(operation)
    body = operation.forward if kind == FORWARD else operation.forward_backward
    columns = decode_batch(body.batch, limits.max_context)
    shape = columns.targets.shape
    answer_bytes = 4 * int(np.prod(shape))
    if answer_bytes > MAX_ANSWER_BYTES:
        raise make_error(
            "OPERATION_TOO_LARGE",
            f"the answer would have {answer_bytes} bytes, at most {MAX_ANSWER_BYTES}: cut the batch by rows",
        )
    loss_inputs = {name: _broadcast(column, shape) for name, column in columns.columns.items()}
    batch = TokenBatch(columns.lengths_R, columns.tokens_T, columns.targets, loss_inputs)
    try:
        loss = LossSpec(body.loss_fn.name, dict(body.loss_fn.config))
        batch.validate(limits, loss.name, forward_only=kind == FORWARD)
        chunks = split(batch)
    except EngineError as error:
        raise make_error(error.reason, error.message) from error
    return PassWork(chunks, loss, kind == FORWARD, body.batch.WhichOneof("form") == "list")


def adam_params(message: types_pb2.AdamParams) -> AdamParams:
    """Returns the optimizer's settings with defaults where unset; BAD_VALUE if they make no sense."""
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    try:
        return AdamParams(**given)
    except EngineError as error:
        raise make_error(error.reason, error.message) from error


def cost_message(cost: PassCost | None) -> admin_pb2.PassCost | None:
    """Returns what passes cost as it is published, None where nothing was measured."""
    if cost is None:
        return None
    return admin_pb2.PassCost(
        fixed_seconds=cost.fixed_seconds,
        seconds_per_token=cost.seconds_per_token,
        seconds_per_square=cost.seconds_per_square,
        bytes_per_token=cost.bytes_per_token,
    )


def lora_config(message: types_pb2.LoraConfig) -> LoraConfig:
    """Returns the shape of a run's adapter; BAD_LORA_CONFIG if no adapter can have it."""
    try:
        return LoraConfig(
            rank=message.rank or 32,
            alpha=message.alpha or 32.0,
            seed=message.seed,
            train_attn=not message.skip_attn,
            train_mlp=not message.skip_mlp,
            train_unembed=not message.skip_unembed,
        )
    except EngineError as error:
        raise make_error(error.reason, error.message) from error


def failure_in(work: PassWork) -> TreadleError | None:
    """Returns the first failure among the chunks that have run."""
    error = next((result.error for result in work.results if result.error is not None), None)
    return None if error is None else make_error(error.reason, error.message)


def pass_result(work: PassWork) -> training_pb2.OperationResult:
    """Returns the answer of a complete forward or forward_backward."""
    lengths = np.concatenate([chunk.lengths_R for chunk in work.chunks])
    logprobs = np.concatenate([result.logprobs_TK for result in work.results])
    outputs = encode_outputs(lengths, logprobs, combine_metrics(work.chunks, work.results), work.as_list)
    result = training_pb2.OperationResult()
    if work.forward_only:
        result.forward.outputs.CopyFrom(outputs)
    else:
        result.forward_backward.outputs.CopyFrom(outputs)
    return result


def combine_metrics(chunks: Sequence[TokenBatch], results: Sequence[ChunkResult]) -> dict[str, float]:
    """Combines the chunks' metrics as their keys say: sum, mean (by datums), min or max."""
    combined: dict[str, float] = {}
    num_rows = sum(chunk.num_rows for chunk in chunks)
    for key in results[0].metrics:
        values = [result.metrics[key] for result in results]
        match key.rpartition(":")[2]:
            case "mean":
                combined[key] = sum(v * c.num_rows for v, c in zip(values, chunks, strict=True)) / num_rows
            case "min":
                combined[key] = min(values)
            case "max":
                combined[key] = max(values)
            case _:
                combined[key] = sum(values)
    return combined


def _broadcast(column: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Repeats a value per position for each of its K targets; the result is writable, as torch wants it."""
    return np.array(column if column.shape == shape else np.broadcast_to(column[:, None], shape), order="C")
