"""Training sequences as columns, and columns as the smallest PackedBatch that says exactly the same.

A batch is a handful of arrays over all positions of all rows. What most batches have in common is not sent:
targets that are the next token, 0/1 weights as more than a bit, a value that is the same for a whole row more than
once. Every choice is checked bit for bit, so decoding gives back equal columns. Knows no losses.

Suffixes: R rows, T model-input positions of all rows, K targets per position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from treadle.errors import BadBatchError
from treadle.tensors import tensor_from_numpy
from treadle.types import Datum, as_token_ids
from treadle.v1 import types_pb2

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
AnyArray = NDArray[Any]  # Rows as the user gave them; their element type is checked here.

TARGETS: Final = "target_tokens"
_ONE_BITS: Final = np.float32(1.0).view(np.uint32)


@dataclass(frozen=True, eq=False)
class Columns:
    """A batch over all positions of all rows; arrays may be read-only.

    `lengths_R` int64 model-input positions of each row, all >= 1; `tokens_T` int32; `targets` int32 [T] or [T, K],
    -1 where there is none; `columns` float32, each [T] or shaped as `targets`, all finite.
    """

    lengths_R: NDArray[np.int64]
    tokens_T: IntArray
    targets: IntArray
    columns: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.lengths_R)

    @property
    def num_positions(self) -> int:
        """Number of model-input positions of all rows."""
        return len(self.tokens_T)

    @property
    def ends_R(self) -> NDArray[np.int64]:
        """The position behind each row's last one."""
        return np.cumsum(self.lengths_R)


def encode_batch(data: Sequence[Datum]) -> types_pb2.PackedBatch:
    """Returns the batch in its cheapest exact layout; raises BadBatchError naming the datum and the field."""
    return pack_columns(columns_from_data(data))


def columns_from_data(data: Sequence[Datum]) -> Columns:
    """Returns the data as columns; raises BadBatchError naming the datum and the field."""
    if len(data) == 0:
        raise BadBatchError("a batch has at least one datum; this one has none")
    names = data[0].loss_fn_inputs.keys()
    for index, datum in enumerate(data):
        if datum.loss_fn_inputs.keys() != names:
            differing = sorted(datum.loss_fn_inputs.keys() ^ names)
            raise BadBatchError(
                f"datum {index}: all data of a batch have the same loss inputs; {differing} differ from datum 0",
                "MISSING_LOSS_INPUT",
            )
    if TARGETS not in names:
        raise BadBatchError(f"datum 0: loss_fn_inputs has no {TARGETS}", "MISSING_LOSS_INPUT")
    tokens = [_token_row(index, datum) for index, datum in enumerate(data)]
    targets = [_target_row(index, datum, len(row)) for index, (datum, row) in enumerate(zip(data, tokens, strict=True))]
    width = max((row.shape[1] for row in targets if row.ndim == 2), default=0)
    columns = {name: _column(name, data, targets, width) for name in names if name != TARGETS}
    result = Columns(
        np.array([len(row) for row in tokens], np.int64),
        np.concatenate(tokens),
        np.concatenate([_widened(row, width, -1) for row in targets]),
        columns,
    )
    check_columns(result)
    return result


def check_columns(batch: Columns) -> None:
    """Raises BadBatchError with the first datum that has an impossible id or a value that is not finite."""
    ends_R = batch.ends_R
    _check_ids(batch.tokens_T, ends_R, "model_input", 0)
    _check_ids(batch.targets, ends_R, TARGETS, -1)
    for name, column in batch.columns.items():
        _check_finite(column, ends_R, name)


def _check_ids(ids: IntArray, ends_R: NDArray[np.int64], name: str, least: int) -> None:
    if int(ids.min()) >= least:
        return
    position = int(np.argmax((ids < least).reshape(len(ids), -1).any(axis=1)))
    row = int(np.searchsorted(ends_R, position, side="right"))
    raise BadBatchError(f"datum {row}: {name} has an id below {least}", "TOKEN_OUT_OF_RANGE")


def _check_finite(column: FloatArray, ends_R: NDArray[np.int64], name: str) -> None:
    finite = np.isfinite(column)
    if finite.all():
        return
    position = int(np.argmin(finite.reshape(len(column), -1).all(axis=1)))
    row = int(np.searchsorted(ends_R, position, side="right"))
    raise BadBatchError(f"datum {row}: {name} has a value that is not finite", "BAD_BATCH_VALUE")


def pack_columns(batch: Columns) -> types_pb2.PackedBatch:
    """Returns valid columns in their cheapest exact layout."""
    packed = types_pb2.PackedBatch()
    if _targets_are_shifted(batch):
        last_R = batch.targets[batch.ends_R - 1]
        tokens = np.insert(batch.tokens_T, batch.ends_R, last_R)
        packed.lengths = (batch.lengths_R + 1).astype("<u4").tobytes()
        packed.tokens.CopyFrom(tensor_from_numpy(tokens))
        packed.targets_shifted = True
    else:
        packed.lengths = batch.lengths_R.astype("<u4").tobytes()
        packed.tokens.CopyFrom(tensor_from_numpy(batch.tokens_T))
        packed.targets.CopyFrom(tensor_from_numpy(batch.targets))
    for name, column in batch.columns.items():
        _pack_column(packed, batch, name, column)
    return packed


def split_rows(data: Sequence[Datum], max_bytes: int) -> list[Sequence[Datum]]:
    """Cuts a batch into parts, in order, whose packed form has at most `max_bytes` each where rows are that short.

    Depends on the data alone, so that the same batch is always cut the same way.
    """
    parts: list[Sequence[Datum]] = []
    start, size = 0, 0
    for index, datum in enumerate(data):
        row_size = _most_bytes(datum)
        if index > start and size + row_size > max_bytes:
            parts.append(data[start:index])
            start, size = index, 0
        size += row_size
    return [*parts, data[start:]]


def _most_bytes(datum: Datum) -> int:
    """Bounds a row's packed size: lengths and the shifted target, and 4 bytes for each element."""
    sizes = (len(datum.array(name).reshape(-1)) for name in datum.loss_fn_inputs)
    return 4 * (2 + datum.model_input.length + sum(sizes))


def _naming(index: int, name: str, convert: Callable[[], IntArray]) -> IntArray:
    try:
        return convert()
    except BadBatchError as error:
        raise BadBatchError(f"datum {index}: {name}: {error.message}", error.reason) from None


def _token_row(index: int, datum: Datum) -> IntArray:
    row = _naming(index, "model_input", datum.model_input.to_numpy)
    if row.ndim != 1 or len(row) == 0:
        raise BadBatchError(f"datum {index}: model_input is a list of at least one token id")
    return row


def _target_row(index: int, datum: Datum, length: int) -> IntArray:
    row = _naming(index, TARGETS, lambda: as_token_ids(datum.array(TARGETS)))
    if row.ndim not in (1, 2) or len(row) != length or row.size == 0:
        raise BadBatchError(
            f"datum {index}: {TARGETS} has the shape {list(row.shape)}; model_input has {length} tokens, "
            f"so it must be [{length}] or [{length}, K]"
        )
    return row


def _widened(row: AnyArray, width: int, fill: int) -> AnyArray:
    """Returns [n] or [n, K] as [n, width], filled up; with a width of 0 the row as it is."""
    if width == 0 or (row.ndim == 2 and row.shape[1] == width):
        return row
    row_nk = row.reshape(len(row), -1)
    return np.pad(row_nk, ((0, 0), (0, width - row_nk.shape[1])), constant_values=fill)


def _column(name: str, data: Sequence[Datum], targets: Sequence[IntArray], width: int) -> FloatArray:
    rows: list[AnyArray] = []
    per_position = True
    for index, (datum, target) in enumerate(zip(data, targets, strict=True)):
        row = datum.array(name)
        if row.dtype.kind not in "fiub":
            raise BadBatchError(f"datum {index}: {name} holds numbers, not elements of type {row.dtype}")
        if row.shape not in ((len(target),), target.shape):
            raise BadBatchError(
                f"datum {index}: {name} has the shape {list(row.shape)}, {TARGETS} has {list(target.shape)}"
            )
        per_position = per_position and row.ndim == 1
        rows.append(row.astype(np.float32, copy=False))
    if per_position and all(target.ndim == 2 for target in targets):
        return np.concatenate(rows)
    for index, (row, target) in enumerate(zip(rows, targets, strict=True)):
        if row.shape != target.shape:
            raise BadBatchError(f"datum {index}: {name} has one value per position, but K in other data of the batch")
    return np.concatenate([_widened(row, width, 0) for row in rows])


def _targets_are_shifted(batch: Columns) -> bool:
    if batch.targets.ndim != 1:
        return False
    ends_R = batch.ends_R
    same_T = np.empty(batch.num_positions, np.bool_)
    np.equal(batch.tokens_T[1:], batch.targets[:-1], out=same_T[:-1])
    # The last target of a row travels as a token, where -1 has no place.
    same_T[ends_R - 1] = batch.targets[ends_R - 1] >= 0
    return bool(same_T.all())


def _pack_column(packed: types_pb2.PackedBatch, batch: Columns, name: str, column: FloatArray) -> None:
    bits = np.ascontiguousarray(column).view(np.uint32)
    # A float costs 32 bits once per row, a mask one bit per position.
    row_form_is_smaller = 32 * batch.num_rows <= column.size
    is_mask = _all_zero_or_one(bits.reshape(-1)[:64]) and _all_zero_or_one(bits)
    if column.ndim == 1 and (row_form_is_smaller or not is_mask):
        first_R = bits[batch.ends_R - batch.lengths_R]
        # One row decides most cases before the whole column is looked at.
        of_first_row = bits[: batch.lengths_R[0]]
        could_repeat = batch.num_rows < batch.num_positions and bool((of_first_row == first_R[0]).all())
        if could_repeat and np.array_equal(np.repeat(first_R, batch.lengths_R), bits):
            packed.row_columns[name].CopyFrom(tensor_from_numpy(first_R.view(np.float32)))
            return
    packed.columns[name].CopyFrom(tensor_from_numpy(column != 0 if is_mask else column))


def _all_zero_or_one(bits: NDArray[np.uint32]) -> bool:
    return bool(((bits == 0) | (bits == _ONE_BITS)).all())


def names_of(columns: Mapping[str, object]) -> str:
    """Returns column names for a message, a few of them, shortened."""
    return ", ".join(name[:40] for name in list(columns)[:8])
