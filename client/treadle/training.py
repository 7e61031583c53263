"""The training client of one run: every call returns at once and takes effect in the order of the calls.

Turns calls into operations and results into values; ordering, resending and acknowledging are the stream's.
"""

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from treadle.batches import (
    loss_from,
    output_from,
    prepare_forward,
    prepare_forward_backward,
    target_shapes,
)
from treadle.channel import Transport
from treadle.convert import adam_to_proto
from treadle.custom_loss import CustomLoss, run_custom_loss
from treadle.errors import BadNameError
from treadle.frames import prepare
from treadle.futures import Handle
from treadle.metrics import MetricLog
from treadle.names import check_id, parse_adapter
from treadle.records import GetInfoResponse, ModelData, RunInfo, TextSample
from treadle.sampling import SamplingClient
from treadle.stream import OperationStream, Results
from treadle.tokenizers import fetch_tokenizer, load_tokenizer
from treadle.types import (
    AdamParams,
    BarrierResponse,
    Datum,
    ForwardBackwardOutput,
    LoadStateResponse,
    OptimStepResponse,
    SaveStateResponse,
    SaveWeightsForSamplerResponse,
)
from treadle.v1 import training_pb2, training_pb2_grpc

T = TypeVar("T")


class TrainingClient:
    """Trains one run. Calls return handles at once; the service works on them in the order of the calls.

    When an operation fails, its handle raises; an `optim_step` behind a failed `forward_backward` fails too, and
    drops the gradient, so that nobody steps on half a batch.
    """

    def __init__(self, transport: Transport, run: RunInfo, tokenizer_id: str = "") -> None:
        self._transport = transport
        self._info = run
        self._tokenizer_id = tokenizer_id
        self._stub = training_pb2_grpc.TrainingServiceStub(transport.ops_channel)
        self._stream = OperationStream(transport, run.name, run.next_seq)
        self._log = MetricLog(transport, run.name)

    @property
    def run(self) -> str:
        """Name of the run, `tenants/{tenant}/runs/{run}`."""
        return self._info.name

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, float] | None = None
    ) -> Handle[ForwardBackwardOutput]:
        """Computes the loss and each target's log-probability without a gradient."""
        submission = self._stream.submit(prepare_forward(data, loss_from(loss_fn, loss_fn_config)))
        shapes = target_shapes(data)
        return Handle(submission.results, lambda results: output_from(results, shapes))

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Handle[ForwardBackwardOutput]:
        """Computes the loss and adds its gradient to the run's; losses are sums over tokens and data."""
        submission = self._stream.submit(prepare_forward_backward(data, loss_from(loss_fn, loss_fn_config)))
        shapes = target_shapes(data)
        return Handle(submission.results, lambda results: output_from(results, shapes))

    def forward_backward_custom(self, data: Sequence[Datum], fn: CustomLoss) -> Handle[ForwardBackwardOutput]:
        """Adds the gradient of a loss of your own: `fn(data, logprobs) -> (loss, metrics)` on torch tensors.

        `fn` runs in a thread of this process, under torch's autograd, when the log-probabilities are there. Later
        calls of this client keep their place behind it.
        """
        return run_custom_loss(self._stream, self.forward(data), data, fn)

    def optim_step(self, adam_params: AdamParams | None = None) -> Handle[OptimStepResponse]:
        """Applies the accumulated gradient with AdamW and clears it."""
        kind = training_pb2.OptimStep(adam=adam_to_proto(adam_params or AdamParams()))
        return self._submit(
            kind, lambda result: OptimStepResponse(dict(result.optim_step.metrics), result.optim_step.step)
        )

    def save_state(self, name: str = "") -> Handle[SaveStateResponse]:
        """Saves weights and optimizer state as a checkpoint with this last name; `step-{step}` when empty."""
        kind = training_pb2.SaveState(checkpoint_id=check_id(name) if name else "")
        return self._submit(kind, lambda result: SaveStateResponse(result.save_state.checkpoint))

    def load_state(self, path: str) -> Handle[LoadStateResponse]:
        """Replaces the weights by those of a revision or checkpoint; the optimizer starts afresh."""
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(self, path: str) -> Handle[LoadStateResponse]:
        """Replaces the weights and the optimizer's state by those of a checkpoint."""
        return self._load(path, with_optimizer=True)

    def save_weights_for_sampler(self, name: str = "") -> Handle[SaveWeightsForSamplerResponse]:
        """Publishes the current weights as a revision with this last name; named by their content when empty."""
        kind = training_pb2.SaveWeightsForSampler(revision_id=check_id(name) if name else "")
        return self._submit(
            kind, lambda result: SaveWeightsForSamplerResponse(result.save_weights_for_sampler.revision)
        )

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """Publishes the current weights and returns at once a client that samples from them when they are there."""
        saved = self.save_weights_for_sampler(name or "")
        return SamplingClient(self._transport, saved, self._info.base, self._tokenizer_id)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """Returns a client that samples from a saved revision."""
        return SamplingClient(self._transport, str(parse_adapter(model_path)), self._info.base, self._tokenizer_id)

    def barrier(self) -> Handle[BarrierResponse]:
        """Finishes when everything before it has; drops the gradient if some of it failed."""
        return self._submit(training_pb2.Barrier(), lambda result: BarrierResponse(result.barrier.num_failed))

    def cancel(self) -> Handle[list[int]]:
        """Cancels what the service has accepted and not started; gives the seqs.

        The handles of those operations raise CancelledOperationError. What has not been sent yet goes on its way.
        """
        request = training_pb2.CancelOperationsRequest(run=self.run, from_seq=1)
        answer = self._transport.start(self._transport.call_async(self._stub.CancelOperations, request))
        return Handle(answer, lambda response: list(response.cancelled_seqs))

    def log_metrics(
        self,
        step: int,
        values: Mapping[str, float],
        samples: Sequence[str | Mapping[str, object] | TextSample] = (),
    ) -> Handle[None]:
        """Keeps values (reward, KL, ...) and sampled texts of a step with the run; nobody need wait for the handle.

        Loss, gradient norm, learning rate and tokens are recorded by the service without this. A step's values may
        come in several calls; a name that comes again replaces its value. Texts are strings, or have prompt, response
        and reward; at most 8 a step, those of a later call replace them. What is refused is also logged as a warning.
        """
        return Handle(self._log.add(step, values, samples), lambda nothing: nothing)

    def get_info(self) -> GetInfoResponse:
        """Returns what this client trains."""
        data = ModelData(model_name=self._info.base, tokenizer_id=self._tokenizer_id or self._info.base)
        return GetInfoResponse(data, self._info.name, self._info.base, self._info.lora.rank)

    def get_tokenizer(self) -> Any:  # The type is transformers', which need not be installed.
        """Returns the base's tokenizer; needs the package transformers."""
        base = self._info.base
        return load_tokenizer(self._tokenizer_id or base, lambda: fetch_tokenizer(self._transport, base))

    def result(self, timeout: float | None = None) -> "TrainingClient":
        """Returns this client, which is there already: Tinker's programs wait for it."""
        return self

    def __await__(self) -> Generator[object, None, "TrainingClient"]:
        return self
        yield  # A generator that ends at once.

    def close(self, wait_seconds: float = 30.0) -> None:
        """Waits for outstanding results, at most so long, and ends the stream."""
        self._transport.wait(self._close(wait_seconds))

    async def _close(self, wait_seconds: float) -> None:
        await asyncio.gather(self._stream.close(wait_seconds), self._log.flush(wait_seconds))

    def _load(self, path: str, *, with_optimizer: bool) -> Handle[LoadStateResponse]:
        name = parse_adapter(path)
        if with_optimizer and name.kind != "checkpoints":
            raise BadNameError(f"{path} is a revision: it has weights only; give a checkpoint, or use load_state")
        kind = training_pb2.LoadState(adapter=str(name), with_optimizer=with_optimizer)
        return self._submit(kind, lambda result: LoadStateResponse(result.load_state.step))

    def _submit(self, kind: Message, convert: Callable[[training_pb2.OperationResult], T]) -> Handle[T]:
        def first(results: Results) -> T:
            return convert(results[0])

        return Handle(self._stream.submit([prepare(kind)]).results, first)
