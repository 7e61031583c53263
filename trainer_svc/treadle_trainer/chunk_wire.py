"""Chunks that travel between trainers, as messages and back: batches, outputs, and flat float32 buffers in pieces.

Pure: numpy and bytes. What comes is checked like anybody's; what is wrong with it is BAD_FRAME or CHECKSUM_MISMATCH.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import google_crc32c
import numpy as np

from treadle.errors import make_error
from treadle.internal.v1 import trainer_pb2
from treadle_engine.batch import BaseLimits, TokenBatch
from treadle_engine.errors import EngineError
from treadle_engine.losses import LossSpec
from treadle_engine.passes import ChunkResult

PIECE_BYTES: Final = 2**20
MOST_CHUNK_BYTES: Final = 2**20
"""A chunk with more bytes is computed where it is."""


def num_bytes(batch: TokenBatch) -> int:
    """Returns about how many bytes a chunk takes on the wire."""
    columns = sum(column.nbytes for column in batch.columns.values())
    return 4 * batch.num_rows + batch.tokens_T.nbytes + batch.targets_TK.nbytes + columns


def encode_chunk(
    chunk_id: int, seq: int, batch: TokenBatch, loss: LossSpec, *, forward_only: bool
) -> trainer_pb2.LentChunk:
    """Returns a chunk as a message."""
    message = trainer_pb2.LentChunk(
        id=chunk_id,
        seq=seq,
        lengths=batch.lengths_R.astype("<u4").tobytes(),
        tokens=batch.tokens_T.astype("<i4").tobytes(),
        targets=batch.targets_TK.astype("<i4").tobytes(),
        num_targets=batch.targets_TK.shape[1] if batch.targets_TK.ndim == 2 else 0,
        columns={name: column.astype("<f4").tobytes() for name, column in batch.columns.items()},
        forward_only=forward_only,
    )
    message.loss_fn.name = loss.name
    message.loss_fn.config.update(loss.config)
    return message


def decode_chunk(message: trainer_pb2.LentChunk, limits: BaseLimits) -> tuple[TokenBatch, LossSpec]:
    """Returns the batch and the loss of a chunk; BAD_FRAME for what no trainer would send."""
    try:
        shape = (-1, message.num_targets) if message.num_targets else (-1,)
        batch = TokenBatch(
            np.frombuffer(message.lengths, "<u4").astype(np.int64),
            np.frombuffer(message.tokens, "<i4").astype(np.int32),
            np.frombuffer(message.targets, "<i4").astype(np.int32).reshape(shape),
            # Copied: torch wants arrays that can be written to.
            {n: np.frombuffer(data, "<f4").astype(np.float32).reshape(shape) for n, data in message.columns.items()},
        )
        loss = LossSpec(message.loss_fn.name, dict(message.loss_fn.config))
        batch.validate(limits, loss.name, forward_only=message.forward_only)
    except (ValueError, EngineError) as error:
        raise make_error("BAD_FRAME", f"the chunk cannot be computed: {error}") from error
    return batch, loss


def encode_result(chunk_id: int, result: ChunkResult, seconds: float) -> trainer_pb2.ChunkComputed:
    """Returns the outputs of a chunk that has no error as a message; its gradient travels in pieces."""
    message = trainer_pb2.ChunkComputed(
        id=chunk_id,
        logprobs=result.logprobs_TK.astype("<f4").tobytes(),
        loss_sum=result.loss_sum,
        metrics=result.metrics,
        gradient_bytes=0 if result.gradient is None else result.gradient.nbytes,
    )
    message.device.FromNanoseconds(int(seconds * 1e9))
    return message


def decode_result(message: trainer_pb2.ChunkComputed, batch: TokenBatch, gradient: bytearray | None) -> ChunkResult:
    """Returns what a chunk gave, with its gradient; BAD_FRAME if it is not of the chunk's shape."""
    try:
        logprobs_TK = np.frombuffer(message.logprobs, "<f4").astype(np.float32).reshape(batch.targets_TK.shape)
    except ValueError as error:
        raise make_error("BAD_FRAME", f"the outputs are not those of the chunk: {error}") from error
    floats = None if gradient is None else np.frombuffer(gradient, "<f4")
    return ChunkResult(logprobs_TK, message.loss_sum, dict(message.metrics), gradient=floats)


def pieces(data: memoryview) -> Iterator[trainer_pb2.FloatPiece]:
    """Yields a buffer in pieces."""
    flat = data.cast("B")
    for start in range(0, len(flat), PIECE_BYTES):
        piece = bytes(flat[start : start + PIECE_BYTES])
        yield trainer_pb2.FloatPiece(crc32c=google_crc32c.value(piece), data=piece)


class Gathering:
    """A buffer that comes in pieces."""

    def __init__(self, num_bytes: int, most_bytes: int) -> None:
        """Expects so many bytes; BAD_FRAME if they are more than can be meant."""
        if num_bytes > most_bytes or num_bytes % 4:
            raise make_error("BAD_FRAME", f"{num_bytes} bytes are announced, at most {most_bytes} can be meant")
        self.data = bytearray(num_bytes)
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether all has come."""
        return self._filled == len(self.data)

    def add(self, piece: trainer_pb2.FloatPiece) -> None:
        """Takes the next piece; CHECKSUM_MISMATCH, BAD_FRAME."""
        if google_crc32c.value(piece.data) != piece.crc32c:
            raise make_error("CHECKSUM_MISMATCH", "a piece was damaged on its way")
        end = self._filled + len(piece.data)
        if end > len(self.data):
            raise make_error("BAD_FRAME", f"more than the announced {len(self.data)} bytes came")
        self.data[self._filled : end] = piece.data
        self._filled = end
