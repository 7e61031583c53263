"""Training batches from the SDK's protobuf to columns and results back, by views and single copies of whole arrays.

Knows nothing of runs and requests.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from treadle.errors import BadBatchError, make_error
from treadle.internal.v1 import tinker_pb2
from treadle.packing import TARGETS, Columns, check_columns, pack_columns
from treadle.tensors import numpy_from_tensor
from treadle.v1 import training_pb2, types_pb2

SAMPLED: Final = "sequence_ratio_mask"
"""The loss input that says which positions were sampled; made from spans where a batch has those instead."""
FLOAT32: Final = 1
INT64: Final = 2
_DTYPES: Final[dict[int, np.dtype[Any]]] = {FLOAT32: np.dtype("<f4"), INT64: np.dtype("<i8"), 3: np.dtype("<i4")}
_LONGEST_ID: Final = 2**31 - 1
# What a position without a value holds: no target, and nothing else.
_FILL: Final = {TARGETS: -1}
AnyArray = NDArray[Any]  # Element types differ by field; each is checked where it is used.


def to_batch(data: Sequence[tinker_pb2.TinkerDatum]) -> types_pb2.PackedBatch:
    """Returns a batch as operations carry it; BadBatchError naming the datum and the field."""
    if not data:
        raise BadBatchError("a batch has at least one datum; this one has none")
    names = sorted(data[0].loss_fn_inputs)
    if TARGETS not in names:
        raise BadBatchError(f"datum 0: loss_fn_inputs has no {TARGETS}", "MISSING_LOSS_INPUT")
    tokens = [_tokens(index, datum) for index, datum in enumerate(data)]
    rows: dict[str, list[AnyArray]] = {name: [] for name in names}
    for index, datum in enumerate(data):
        if sorted(datum.loss_fn_inputs) != names:
            raise BadBatchError(
                f"datum {index}: all data of a batch have the same loss inputs; datum 0 has {', '.join(names)[:200]}",
                "MISSING_LOSS_INPUT",
            )
        for name in names:
            rows[name].append(_field(index, name, datum.loss_fn_inputs[name], len(tokens[index])))
    columns = {name: _joined(name, arrays) for name, arrays in rows.items()}
    if SAMPLED not in columns and all(datum.loss_fn_input_spans for datum in data):
        columns[SAMPLED] = np.concatenate(
            [_sampled(index, datum, len(tokens[index])) for index, datum in enumerate(data)]
        )
    _widen_weights(columns)
    targets = columns.pop(TARGETS)
    if targets.size and int(targets.max()) > _LONGEST_ID:
        raise BadBatchError(f"{TARGETS} has an id above {_LONGEST_ID}", "TOKEN_OUT_OF_RANGE")
    batch = Columns(
        np.array([len(row) for row in tokens], np.int64),
        np.concatenate(tokens),
        targets.astype(np.int32),
        {name: column.astype(np.float32, copy=False) for name, column in columns.items()},
    )
    check_columns(batch)
    return pack_columns(batch)


def to_output(outputs: training_pb2.LossOutputs) -> bytes:
    """Returns the protobuf result of a batch; the log-probs' bytes are taken as they are."""
    lengths_R = np.frombuffer(outputs.lengths, "<u4").astype(np.int64)
    width = list(outputs.logprobs.shape[1:])
    item = 4 * (width[0] if width else 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_R) * item])
    field = tinker_pb2.TinkerBatchedTensor(
        data=outputs.logprobs.data if not outputs.logprobs.codec else numpy_from_tensor(outputs.logprobs).tobytes(),
        offsets=offsets.astype("<i8").tobytes(),
        dtype=FLOAT32,
        trailing_shape=width,
    )
    record = tinker_pb2.TinkerArrayRecord(num_datums=len(lengths_R), fields={"logprobs": field})
    answer = tinker_pb2.TinkerForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics=outputs.metrics
    )
    return answer.SerializeToString()


def loss_config(request: tinker_pb2.TinkerForwardBackwardRequest) -> dict[str, float]:
    """Returns the settings of a loss; BAD_BATCH_VALUE for a text, which no loss here takes."""
    if not request.loss_fn_config_v2:
        return dict(request.loss_fn_config)
    config: dict[str, float] = {}
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise make_error("BAD_BATCH_VALUE", f"loss_fn_config {name[:40]!r} is a text; {request.loss_fn} takes none")
        config[name] = value.number
    return config


def _tokens(index: int, datum: tinker_pb2.TinkerDatum) -> NDArray[np.int32]:
    parts = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            what = {"image": "an image", "dmel": "audio"}.get(kind or "", "a chunk of an unknown kind")
            raise BadBatchError(f"datum {index}: model_input has {what}; the bases here take text only")
        data = chunk.encoded_text.tokens
        if len(data) % 4:
            raise BadBatchError(f"datum {index}: model_input: {len(data)} bytes are no int32 tokens")
        parts.append(np.frombuffer(data, "<i4"))
    row = np.concatenate(parts) if len(parts) != 1 else parts[0]
    if not len(row):
        raise BadBatchError(f"datum {index}: model_input has no token")
    return row


def _sampled(index: int, datum: tinker_pb2.TinkerDatum, length: int) -> NDArray[np.float32]:
    """Returns 1 where a position was sampled, 0 where it is of a prompt."""
    parts = [(span.WhichOneof("span") or "", span) for span in datum.loss_fn_input_spans]
    kinds = [kind == "sampled_tokens" for kind, _ in parts]
    lengths = [getattr(span, kind).length if kind else 0 for kind, span in parts]
    if min(lengths) < 0 or sum(lengths) != length:
        raise BadBatchError(f"datum {index}: loss_fn_input_spans cover {sum(lengths)} of {length} positions")
    return np.repeat(np.array(kinds, np.float32), lengths)


def _field(index: int, name: str, tensor: tinker_pb2.TinkerTensor, length: int) -> AnyArray:
    """Returns a loss input as [n] or [n, K]; sparse cells that are not named hold no target, or 0."""
    where = f"datum {index}: {name[:40]}"
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise BadBatchError(f"{where} has the element type {tensor.dtype}; float32 and int64 are known")
    shape = tuple(tensor.shape)
    encoding = tensor.WhichOneof("encoding")
    data = tensor.sparse_csr.values if encoding == "sparse_csr" else tensor.dense
    if len(data) % dtype.itemsize:
        raise BadBatchError(f"{where}: {len(data)} bytes are no whole elements")
    values = np.frombuffer(data, dtype)
    if encoding == "sparse_csr":
        array = _dense(where, values, tensor, _FILL.get(name, 0))
    elif any(size < 0 for size in shape) or (shape and int(np.prod(shape, dtype=object)) != len(values)):
        raise BadBatchError(f"{where} has the shape {list(shape)} and {len(values)} elements")
    else:
        array = values.reshape(shape or (len(values),))
    if array.ndim not in (1, 2) or len(array) != length or array.size == 0:
        raise BadBatchError(
            f"{where} has the shape {list(array.shape)}; model_input has {length} tokens, so it must be [{length}] or "
            f"[{length}, K]"
        )
    return array


def _dense(where: str, values: AnyArray, tensor: tinker_pb2.TinkerTensor, fill: int) -> AnyArray:
    csr = tensor.sparse_csr
    if len(tensor.shape) != 2 or len(csr.crow_indices) % 8 or len(csr.col_indices) % 8:
        raise BadBatchError(f"{where}: a sparse array has two dimensions and int64 indices")
    rows, width = tensor.shape
    crow, col = np.frombuffer(csr.crow_indices, "<i8"), np.frombuffer(csr.col_indices, "<i8")
    fits = len(crow) == rows + 1 and len(col) == len(values) and rows > 0 and 0 < width <= 2**16
    counts = np.diff(crow) if fits else np.zeros(0, np.int64)
    if not fits or crow[0] != 0 or crow[-1] != len(col) or (counts < 0).any() or ((col < 0) | (col >= width)).any():
        raise BadBatchError(f"{where}: the indices of the sparse array do not fit its shape {list(tensor.shape)}")
    array = np.full((rows, width), fill, values.dtype)
    array[np.repeat(np.arange(rows), counts), col] = values
    return array


def _joined(name: str, arrays: list[AnyArray]) -> AnyArray:
    """Returns the rows one after the other; where some have K values per position, all are filled up to the widest."""
    width = max((array.shape[1] for array in arrays if array.ndim == 2), default=0)
    if not width:
        return np.concatenate(arrays)
    wide = []
    for array in arrays:
        matrix = array.reshape(len(array), -1)
        room = ((0, 0), (0, width - matrix.shape[1]))
        wide.append(np.pad(matrix, room, constant_values=_FILL.get(name, 0)))
    return np.concatenate(wide)


def _widen_weights(columns: dict[str, AnyArray]) -> None:
    """Fills [T, k] inputs up to the [T, K] of the targets: sparse forms drop what is padding in all rows."""
    targets = columns[TARGETS]
    if targets.ndim != 2:
        return
    widest = max(column.shape[1] for column in columns.values() if column.ndim == 2)
    for name, column in columns.items():
        if column.ndim == 2 and column.shape[1] < widest:
            room = ((0, 0), (0, widest - column.shape[1]))
            columns[name] = np.pad(column, room, constant_values=_FILL.get(name, 0))
