"""Batches and their results on the wire: what clients and servers share of the message formats, numpy only.

Decoding takes messages of anybody: ragged rows, lying lengths, wrong types and values that are not finite give
BadBatchError with the datum and the field, and memory stays within a small multiple of the bytes that came.
Knows no losses and no vocabulary; those checks are the trainer's.

Suffixes: R rows, T model-input positions of all rows, K targets per position.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from treadle.errors import BadBatchError
from treadle.packing import TARGETS, Columns, check_columns, columns_from_data, encode_batch, names_of, pack_columns
from treadle.tensors import numpy_from_tensor, tensor_from_numpy
from treadle.v1 import training_pb2, types_pb2

__all__ = [
    "Columns",
    "columns_from_data",
    "decode_batch",
    "decode_outputs",
    "decode_tokens",
    "encode_batch",
    "encode_outputs",
    "encode_tokens",
    "numpy_from_tensor",
    "pack_columns",
    "tensor_from_numpy",
]

FloatArray = NDArray[np.float32]
LengthArray = NDArray[np.int64]

# A loss uses a handful of columns; the bound keeps a hostile batch from expanding many row columns.
_MAX_COLUMNS: Final = 16
_COLUMN_DTYPES: Final = (
    types_pb2.DTYPE_FLOAT32,
    types_pb2.DTYPE_FLOAT16,
    types_pb2.DTYPE_BITMASK,
)


def decode_batch(batch: types_pb2.Batch, max_positions: int | None = None) -> Columns:
    """Returns a batch of either form as columns; raises BadBatchError, also for a row above `max_positions`."""
    form = batch.WhichOneof("form")
    if form is None:
        raise BadBatchError("the batch is empty: set `packed` or `list`")
    columns = _decode_packed(batch.packed) if form == "packed" else _decode_list(batch.list)
    longest = int(columns.lengths_R.max())
    if max_positions is not None and longest > max_positions:
        row = int(columns.lengths_R.argmax())
        raise BadBatchError(
            f"datum {row} has {longest} positions; at most {max_positions} are possible here", "SEQUENCE_TOO_LONG"
        )
    check_columns(columns)
    return columns


def encode_outputs(
    lengths_R: LengthArray, logprobs: FloatArray, metrics: Mapping[str, float], as_list: bool = False
) -> training_pb2.LossOutputs:
    """Returns per-position results, `logprobs` float32 [T] or [T, K], as a message; as one list per row if wanted."""
    outputs = training_pb2.LossOutputs(lengths=lengths_R.astype("<u4").tobytes(), metrics=metrics)
    logprobs = logprobs.astype(np.float32, copy=False)
    if as_list:
        for row in np.split(logprobs, np.cumsum(lengths_R)[:-1]):
            outputs.logprobs_list.add(values=row.reshape(-1).tolist())
    else:
        outputs.logprobs.CopyFrom(tensor_from_numpy(logprobs))
    return outputs


def decode_outputs(outputs: training_pb2.LossOutputs) -> tuple[list[FloatArray], dict[str, float]]:
    """Returns each row's log-probabilities, [n] or [n, K], and the metrics; raises BadBatchError if they do not fit."""
    lengths_R = _decode_lengths(outputs.lengths, 0)
    if outputs.logprobs_list:
        rows = [np.array(row.values, np.float32) for row in outputs.logprobs_list]
        if [len(row) for row in rows] != lengths_R.tolist():
            raise BadBatchError("the lists of log-probabilities do not have the stated lengths")
        return rows, dict(outputs.metrics)
    logprobs = _floats(outputs.logprobs, "logprobs")
    if logprobs.ndim not in (1, 2) or len(logprobs) != int(lengths_R.sum()):
        raise BadBatchError("the log-probabilities do not have the stated lengths")
    return np.split(logprobs, np.cumsum(lengths_R)[:-1]), dict(outputs.metrics)


def encode_tokens(tokens: NDArray[np.int32]) -> types_pb2.Tokens:
    """Returns token ids, int32[n], as packed bytes."""
    return types_pb2.Tokens(packed=tokens.astype("<i4", copy=False).tobytes())


def decode_tokens(tokens: types_pb2.Tokens) -> NDArray[np.int32]:
    """Returns token ids of either form as int32[n]; raises BadBatchError for bytes that are not whole numbers."""
    if tokens.WhichOneof("form") == "list":
        return np.array(tokens.list.ids, np.int32)
    data = tokens.packed
    if len(data) % 4:
        raise BadBatchError(f"packed token ids are 4 bytes each; {len(data)} bytes are not a multiple of that")
    return np.frombuffer(data, "<i4")


def _decode_lengths(data: bytes, least: int) -> LengthArray:
    if len(data) == 0 or len(data) % 4:
        raise BadBatchError(f"lengths are 4 bytes for each of at least one row; there are {len(data)} bytes")
    lengths_R = np.frombuffer(data, "<u4").astype(np.int64)
    if int(lengths_R.min()) < least:
        row = int(lengths_R.argmin())
        raise BadBatchError(f"datum {row}: a length of {lengths_R[row]} is too short; the least is {least}")
    return lengths_R


def _decode_packed(packed: types_pb2.PackedBatch) -> Columns:
    shifted = packed.targets_shifted
    if shifted == packed.HasField("targets"):
        reason = "BAD_SHAPE" if shifted else "MISSING_LOSS_INPUT"
        raise BadBatchError("give either `targets` or targets_shifted = true", reason)
    wire_lengths_R = _decode_lengths(packed.lengths, 2 if shifted else 1)
    tokens = _integers(packed.tokens, "tokens")
    total = int(wire_lengths_R.sum())
    if tokens.shape != (total,):
        raise BadBatchError(f"tokens have the shape {list(tokens.shape)}; the lengths add up to {total}")
    if shifted:
        is_last = np.zeros(total, np.bool_)
        is_last[np.cumsum(wire_lengths_R) - 1] = True
        is_input = ~is_last
        # The first token of a row is no target; it stands right behind the last one of the row before.
        is_target = np.roll(is_input, 1)
        lengths_R, tokens_T, targets = wire_lengths_R - 1, tokens[is_input], tokens[is_target]
    else:
        lengths_R, tokens_T = wire_lengths_R, tokens
        targets = _integers(packed.targets, TARGETS)
        if targets.ndim not in (1, 2) or len(targets) != total or targets.size == 0:
            raise BadBatchError(f"{TARGETS} have the shape {list(targets.shape)}; there are {total} positions")
    return Columns(lengths_R, tokens_T, targets, _decode_columns(packed, lengths_R, targets.shape))


def _decode_columns(
    packed: types_pb2.PackedBatch, lengths_R: LengthArray, shape: tuple[int, ...]
) -> dict[str, FloatArray]:
    both = packed.columns.keys() & packed.row_columns.keys()
    if both or len(packed.columns) + len(packed.row_columns) > _MAX_COLUMNS:
        raise BadBatchError(
            f"at most {_MAX_COLUMNS} loss inputs, each given once; twice: {names_of(dict.fromkeys(both))}"
        )
    columns = {}
    for name, tensor in packed.columns.items():
        column = _floats(tensor, name)
        if column.shape not in (shape[:1], shape):
            raise BadBatchError(f"{name} has the shape {list(column.shape)}; {TARGETS} have {list(shape)}")
        columns[name] = column
    for name, tensor in packed.row_columns.items():
        column_R = _floats(tensor, name)
        if column_R.shape != lengths_R.shape:
            raise BadBatchError(f"{name} has the shape {list(column_R.shape)}; there are {len(lengths_R)} rows")
        columns[name] = np.repeat(column_R, lengths_R)
    return columns


def _decode_list(data: types_pb2.DatumList) -> Columns:
    if not data.data:
        raise BadBatchError("a batch has at least one datum; this one has none")
    names = data.data[0].loss_fn_inputs.keys()
    if len(names) > _MAX_COLUMNS:
        raise BadBatchError(f"datum 0: {len(names)} loss inputs are too many; at most {_MAX_COLUMNS}")
    for row, datum in enumerate(data.data):
        if not datum.tokens:
            raise BadBatchError(f"datum {row}: tokens are empty")
        if not datum.target_tokens:
            raise BadBatchError(f"datum {row}: there are no {TARGETS}", "MISSING_LOSS_INPUT")
        _check_length(row, TARGETS, len(datum.target_tokens), len(datum.tokens))
        if datum.loss_fn_inputs.keys() != names:
            raise BadBatchError(
                f"datum {row}: all data of a batch have the same loss inputs; these differ from datum 0's",
                "MISSING_LOSS_INPUT",
            )
        for name, values in datum.loss_fn_inputs.items():
            _check_length(row, name, len(values.values), len(datum.tokens))
    return Columns(
        np.array([len(datum.tokens) for datum in data.data], np.int64),
        np.concatenate([np.array(datum.tokens, np.int32) for datum in data.data]),
        np.concatenate([np.array(datum.target_tokens, np.int32) for datum in data.data]),
        {
            name: np.concatenate([np.array(datum.loss_fn_inputs[name].values, np.float32) for datum in data.data])
            for name in names
        },
    )


def _check_length(row: int, name: str, length: int, expected: int) -> None:
    if length != expected:
        raise BadBatchError(f"datum {row}: {name[:40]} has {length} values for {expected} tokens")


def _integers(tensor: types_pb2.Tensor, name: str) -> NDArray[np.int32]:
    if tensor.dtype != types_pb2.DTYPE_INT32:
        raise BadBatchError(f"{name}: token ids are sent as int32")
    return numpy_from_tensor(tensor, name)


def _floats(tensor: types_pb2.Tensor, name: str) -> FloatArray:
    if tensor.dtype not in _COLUMN_DTYPES:
        raise BadBatchError(f"{name[:40]}: loss inputs are sent as float32, float16 or bit mask")
    array: NDArray[Any] = numpy_from_tensor(tensor, name[:40])
    return array.astype(np.float32, copy=False)
