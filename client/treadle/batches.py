"""A batch as operations, and the operations' results as one output again.

A batch that does not fit into a frame is cut by rows; as losses are sums, accumulating the parts' gradients gives
what the whole would have given. Knows the reductions of metrics; knows no losses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from treadle.errors import BadInputError
from treadle.frames import FRAME_OVERHEAD_BYTES, MAX_FRAME_BYTES, prepare
from treadle.ledger import PreparedOperation
from treadle.packing import TARGETS, AnyArray, encode_batch, split_rows
from treadle.types import Datum, ForwardBackwardOutput, TensorData
from treadle.v1 import training_pb2, types_pb2
from treadle.wire import decode_outputs

# Room for the loss, its settings and the map's names beside the rows.
_PART_BYTES: Final = MAX_FRAME_BYTES - FRAME_OVERHEAD_BYTES - 4096


def prepare_forward(data: Sequence[Datum], loss: training_pb2.LossFn) -> list[PreparedOperation]:
    """Returns the Forward operations of a batch; raises BadBatchError before anything is sent."""
    return [prepare(training_pb2.Forward(batch=batch, loss_fn=loss)) for batch in _cut(data)]


def prepare_forward_backward(data: Sequence[Datum], loss: training_pb2.LossFn) -> list[PreparedOperation]:
    """Returns the ForwardBackward operations of a batch; raises BadBatchError before anything is sent."""
    return [prepare(training_pb2.ForwardBackward(batch=batch, loss_fn=loss)) for batch in _cut(data)]


def _cut(data: Sequence[Datum]) -> list[types_pb2.Batch]:
    """Returns the batch whole if it fits into a frame, else its parts; depends on the data alone."""
    whole = types_pb2.Batch(packed=encode_batch(data))
    if len(data) == 1 or whole.ByteSize() <= _PART_BYTES:
        return [whole]
    return [types_pb2.Batch(packed=encode_batch(part)) for part in split_rows(data, _PART_BYTES)]


def loss_from(name: str, config: Mapping[str, float] | None) -> training_pb2.LossFn:
    """Returns the loss and its settings; raises BadInputError for settings that are not numbers."""
    for key, value in (config or {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise BadInputError(f"loss_fn_config[{key!r}] is {value!r}; it must be a number")
    return training_pb2.LossFn(name=name, config={key: float(value) for key, value in (config or {}).items()})


def target_shapes(data: Sequence[Datum]) -> list[tuple[int, ...]]:
    """Returns the shape of each datum's targets, which its log-probabilities have too."""
    return [datum.array(TARGETS).shape for datum in data]


def output_from(
    results: Sequence[training_pb2.OperationResult], shapes: Sequence[tuple[int, ...]]
) -> ForwardBackwardOutput:
    """Returns the output of a batch from the results of its parts, one entry per datum in their order."""
    rows: list[AnyArray] = []
    metrics: list[tuple[int, dict[str, float]]] = []
    for result in results:
        kind = result.forward if result.HasField("forward") else result.forward_backward
        part_rows, part_metrics = decode_outputs(kind.outputs)
        rows.extend(part_rows)
        metrics.append((len(part_rows), part_metrics))
    outputs = [{"logprobs": TensorData(_fitted(row, shape))} for row, shape in zip(rows, shapes, strict=True)]
    return ForwardBackwardOutput(outputs, merge_metrics(metrics))


def merge_metrics(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Combines the metrics of parts with so many data each, by the reduction that stands behind the colon."""
    if len(parts) == 1:
        return dict(parts[0][1])
    merged = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        reduce = _REDUCTIONS.get(name.rpartition(":")[2])
        # What cannot be combined is left out: no number is better than a wrong one.
        if reduce is not None:
            present = [(weight, metrics[name]) for weight, metrics in parts if name in metrics]
            merged[name] = reduce([weight for weight, _ in present], [value for _, value in present])
    return merged


def _weighted_mean(weights: Sequence[int], values: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / max(sum(weights), 1)


_REDUCTIONS: Final[Mapping[str, Callable[[Sequence[int], Sequence[float]], float]]] = {
    "sum": lambda _, values: sum(values),
    "mean": _weighted_mean,
    "min": lambda _, values: min(values),
    "max": lambda _, values: max(values),
}


def _fitted(row: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Takes off what was filled up because other data of the batch had more targets per position."""
    if row.ndim == 2:
        return row[:, 0] if len(shape) == 1 else row[:, : shape[1]]
    return row.reshape(shape)
