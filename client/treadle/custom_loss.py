"""Losses of the user's own, computed here.

Log-probabilities come here, a Python function runs under torch's autograd, and its gradient goes back as the weights
of a cross entropy:
d loss / d theta = sum_t (d loss / d logprob_t) (d logprob_t / d theta), which is the gradient of a cross entropy with
the weights -d loss / d logprob_t. torch is imported from the user's environment when it is first needed.
"""

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from treadle.batches import loss_from, output_from, prepare_forward_backward, target_shapes
from treadle.errors import BadInputError
from treadle.frames import prepare
from treadle.futures import Handle
from treadle.ledger import PreparedOperation
from treadle.packing import TARGETS
from treadle.stream import OperationStream, Results, Submission
from treadle.types import Datum, ForwardBackwardOutput, TensorData
from treadle.v1 import training_pb2

# Tensors are the user's torch's; a loss gets the data and one tensor of log-probabilities per datum.
TorchTensor = Any
CustomLoss = Callable[[list[Datum], list[TorchTensor]], tuple[TorchTensor, dict[str, float]]]
CustomGradient = tuple[list[Datum], dict[str, float]]

SURROGATE: Final = "surrogate_"


def run_custom_loss(
    stream: OperationStream, forward: Handle[ForwardBackwardOutput], data: Sequence[Datum], fn: CustomLoss
) -> Handle[ForwardBackwardOutput]:
    """Reserves the next place in the stream for the gradient of `fn`, and computes it in a thread of its own."""
    place = stream.submit(None)
    gradient: Future[CustomGradient] = Future()
    work = _Work(stream, place, forward, list(data), fn, gradient)
    threading.Thread(target=work.run, name="treadle-custom-loss", daemon=True).start()
    shapes = target_shapes(data)
    done: Future[Results] = Future()

    def after_gradient(_: "Future[CustomGradient]") -> None:
        error = gradient.exception()
        if error is not None:
            done.set_exception(error)
        else:
            place.results.add_done_callback(after_backward)

    def after_backward(results: "Future[Results]") -> None:
        error = results.exception()
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(results.result())

    def to_output(results: Results) -> ForwardBackwardOutput:
        output = output_from(results, shapes)
        surrogate = {f"{SURROGATE}{name}": value for name, value in output.metrics.items()}
        return ForwardBackwardOutput(output.loss_fn_outputs, {**surrogate, **gradient.result()[1]})

    gradient.add_done_callback(after_gradient)
    return Handle(done, to_output)


@dataclass(frozen=True)
class _Work:
    """One evaluation of a custom loss, from log-probabilities to the operations that carry its gradient."""

    stream: OperationStream
    place: Submission
    forward: Handle[ForwardBackwardOutput]
    data: list[Datum]
    fn: CustomLoss
    gradient: "Future[CustomGradient]"

    def run(self) -> None:
        """Fills the reserved place, whatever the user's function does."""
        # The place must be filled also when the function raises: an operation without a batch fails on the service,
        # which makes the optimizer step behind it fail as well instead of stepping without this gradient.
        operations = [prepare(training_pb2.ForwardBackward())]
        try:
            operations = self._compute()
        except BaseException as error:  # noqa: BLE001 - the thread's outermost guard; the handle raises it.
            self.gradient.set_exception(error)
        finally:
            self.stream.fill(self.place, operations)

    def _compute(self) -> list[PreparedOperation]:
        output = self.forward.result()
        logprobs = [entry["logprobs"].to_numpy() for entry in output.loss_fn_outputs]
        weighted, metrics = weighted_data(self.data, logprobs, self.fn)
        operations = prepare_forward_backward(weighted, loss_from("cross_entropy", None))
        self.gradient.set_result((weighted, metrics))
        return operations


def weighted_data(data: list[Datum], logprobs: Sequence[Any], fn: CustomLoss) -> CustomGradient:
    """Returns the data with the weights -d loss / d logprob, and the metrics with `loss:sum`; needs torch."""
    torch = importlib.import_module("torch")
    # A copy: arrays of results are read-only, and the function may write into its tensors.
    leaves = [torch.tensor(np.asarray(row), dtype=torch.float32, requires_grad=True) for row in logprobs]
    loss, metrics = fn(data, leaves)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise BadInputError("a custom loss returns a torch tensor of one element and a dict of metrics")
    if loss.requires_grad:
        loss.backward()
    weighted = []
    for datum, leaf in zip(data, leaves, strict=True):
        gradient = np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()
        weighted.append(Datum(datum.model_input, {TARGETS: datum.array(TARGETS), "weights": TensorData(-gradient)}))
    return weighted, {"loss:sum": float(loss.detach()), **{name: float(value) for name, value in metrics.items()}}
