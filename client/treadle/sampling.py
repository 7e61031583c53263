"""The sampling client of one revision or base: requests return at once and are repeated when a worker is lost.

The seed is fixed on this side before the first try, so that a repeated request draws the same tokens. Knows nothing
of which worker answers.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import grpc.aio

from treadle.channel import Backoff, Transport, failure_of
from treadle.convert import prompt_logprobs_from, sampling_to_proto, sequence_from, stop_reason_from, top_from
from treadle.errors import BadSamplingParamsError, LimitError, TreadleError
from treadle.futures import Handle
from treadle.tensors import tensor_from_numpy
from treadle.tokenizers import fetch_tokenizer, load_tokenizer
from treadle.types import (
    ArrayInput,
    ModelInput,
    SampleDelta,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    as_token_ids,
)
from treadle.v1 import sampling_pb2, sampling_pb2_grpc
from treadle.wire import decode_tokens, encode_tokens, numpy_from_tensor

Saved = Handle[SaveWeightsForSamplerResponse]


class SamplingClient:
    """Samples from one model: a revision's name, a base's name, or a revision that is still being saved."""

    def __init__(self, transport: Transport, model: "str | Saved", base: str = "", tokenizer_id: str = "") -> None:
        self._transport = transport
        self._model = model
        self._base = base
        self._tokenizer_id = tokenizer_id
        self._stub = sampling_pb2_grpc.SamplingServiceStub(transport.ops_channel)

    @property
    def model(self) -> str:
        """Name of the model; waits while it is being saved."""
        return self._model if isinstance(self._model, str) else self._model.result().path

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: ArrayInput | None = None,
        prompt_logprobs_last_n: int | None = None,
    ) -> Handle[SampleResponse]:
        """Draws continuations of the prompt; sample i of a seed is always the same, and differs from sample j.

        The `topk_...` ask for so many of the likeliest tokens at each position, `target_prompt_logprobs` (token ids
        [n, k] for a prompt of n) for the log-probabilities of those tokens there; `prompt_logprobs_last_n` limits what
        is said about the prompt to its last positions, so that a beginning that is known need not be computed again.
        """
        request = self._request(prompt, num_samples, sampling_params, include_prompt_logprobs)
        request.topk_prompt_logprobs, request.topk_logprobs = topk_prompt_logprobs, topk_sample_logprobs
        if target_prompt_logprobs is not None:
            request.target_prompt_tokens.CopyFrom(tensor_from_numpy(as_token_ids(target_prompt_logprobs)))
        if prompt_logprobs_last_n is not None:
            request.prompt_logprobs_last_n = prompt_logprobs_last_n
        return Handle(self._transport.start(self._sample(request)), _response_from)

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> Handle[list[float | None]]:
        """Computes each token's log-probability given those before it; None for the first and what is not asked for."""
        tokens = encode_tokens(prompt.to_numpy())
        request = sampling_pb2.ComputeLogprobsRequest(tokens=tokens, prompt_logprobs_last_n=prompt_logprobs_last_n)
        return Handle(
            self._transport.start(self._compute_logprobs(request)),
            lambda response: prompt_logprobs_from(response.logprobs),
        )

    def sample_stream(
        self, prompt: ModelInput, num_samples: int = 1, sampling_params: SamplingParams | None = None
    ) -> "SampleStream":
        """Draws continuations token by token: iterate with `for` or `async for`."""
        request = self._request(prompt, num_samples, sampling_params, False)
        return SampleStream(self._transport, self._stub, request, self._resolved)

    def get_base_model(self) -> str:
        """Returns the name of the base."""
        return self._base or self.model

    def get_tokenizer(self) -> Any:  # The type is transformers', which need not be installed.
        """Returns the base's tokenizer; needs the package transformers."""
        base = self.get_base_model()
        return load_tokenizer(self._tokenizer_id or base, lambda: fetch_tokenizer(self._transport, base))

    def result(self, timeout: float | None = None) -> "SamplingClient":
        """Waits until the model is there and returns this client; raises what saving it raised."""
        if not isinstance(self._model, str):
            self._model.result(timeout)
        return self

    def __await__(self) -> Generator[object, None, "SamplingClient"]:
        if not isinstance(self._model, str):
            yield from self._model.__await__()
        return self

    def _request(
        self, prompt: ModelInput, num_samples: int, params: SamplingParams | None, prompt_logprobs: bool
    ) -> sampling_pb2.SampleRequest:
        if num_samples < 1:
            raise BadSamplingParamsError(f"num_samples is {num_samples}; it must be at least 1")
        return sampling_pb2.SampleRequest(
            prompt=encode_tokens(prompt.to_numpy()),
            num_samples=num_samples,
            params=sampling_to_proto(params or SamplingParams()),
            prompt_logprobs=prompt_logprobs,
        )

    async def _resolved(self) -> str:
        return self._model if isinstance(self._model, str) else (await self._model).path

    async def _sample(self, request: sampling_pb2.SampleRequest) -> sampling_pb2.SampleResponse:
        request.model = await self._resolved()
        return await self._transport.call_async(
            self._stub.Sample,
            request,
            seconds=self._transport.settings.sample_seconds,
            metadata=(("x-treadle-model", request.model),),
        )

    async def _compute_logprobs(
        self, request: sampling_pb2.ComputeLogprobsRequest
    ) -> sampling_pb2.ComputeLogprobsResponse:
        request.model = await self._resolved()
        return await self._transport.call_async(
            self._stub.ComputeLogprobs,
            request,
            seconds=self._transport.settings.sample_seconds,
            metadata=(("x-treadle-model", request.model),),
        )


class SampleStream:
    """Continuations as they are drawn; after a lost worker it goes on where it was. Leave early with `close`."""

    def __init__(
        self,
        transport: Transport,
        stub: sampling_pb2_grpc.SamplingServiceStub,
        request: sampling_pb2.SampleRequest,
        model: Callable[[], Awaitable[str]],
    ) -> None:
        self._transport = transport
        self._stub = stub
        self._request = request
        self._model = model
        self._call: Any = None  # grpc.aio's call object, made on the SDK's thread.
        self._num_received: Counter[int] = Counter()
        self._to_skip: Counter[int] = Counter()
        self._backoff = Backoff()

    def __iter__(self) -> Iterator[SampleDelta]:
        return self

    def __next__(self) -> SampleDelta:
        delta = self._transport.wait(self._read())
        if delta is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> AsyncIterator[SampleDelta]:
        return self

    async def __anext__(self) -> SampleDelta:
        future: Future[SampleDelta | None] = self._transport.start(self._read())
        delta = await Handle(future, lambda read: read)
        if delta is None:
            raise StopAsyncIteration
        return delta

    def close(self) -> None:
        """Gives up the rest; the sampler drops it."""
        self._transport.wait(self._cancel())

    async def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

    async def _read(self) -> SampleDelta | None:
        if not self._request.model:
            self._request.model = await self._model()
        failing_since: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            if self._call is None:
                self._open()
            try:
                response = await self._call.read()
            except grpc.aio.AioRpcError as error:
                failure, again = failure_of(error)
                failing_since = failing_since or loop.time()
                settings = self._transport.settings
                limited = isinstance(failure, LimitError)
                patience = settings.give_up_after_seconds if limited else settings.retry_seconds
                if not again or loop.time() - failing_since > patience:
                    raise failure from None
                await self._reopen_later(failure)
                continue
            if response is grpc.aio.EOF:
                return None
            self._backoff.reset()
            delta = self._unseen(response)
            if delta is not None:
                return delta

    def _open(self) -> None:
        metadata = (*self._transport.metadata, ("x-treadle-model", self._request.model))
        request = sampling_pb2.StreamSampleRequest(request=self._request)
        seconds = self._transport.settings.sample_seconds
        self._call = self._stub.StreamSample(request, timeout=seconds, metadata=metadata)

    async def _reopen_later(self, failure: TreadleError) -> None:
        # The seed is fixed, so the new stream begins with the tokens that have come already.
        self._call, self._to_skip = None, self._num_received.copy()
        await asyncio.sleep(max(self._backoff.next_seconds(), failure.retry_after_seconds or 0.0))

    def _unseen(self, response: sampling_pb2.StreamSampleResponse) -> SampleDelta | None:
        tokens = decode_tokens(response.tokens).tolist()
        logprobs = numpy_from_tensor(response.logprobs, "logprobs").tolist()
        skip = min(self._to_skip[response.index], len(tokens))
        self._to_skip[response.index] -= skip
        self._num_received[response.index] += len(tokens) - skip
        reason = stop_reason_from(response.stop_reason)
        if skip == len(tokens) and reason is None:
            return None
        return SampleDelta(response.index, tokens[skip:], logprobs[skip:], reason)


def _response_from(response: sampling_pb2.SampleResponse) -> SampleResponse:
    has_prompt = response.HasField("prompt_logprobs")
    return SampleResponse(
        sequences=[sequence_from(sequence) for sequence in response.sequences],
        prompt_logprobs=prompt_logprobs_from(response.prompt_logprobs) if has_prompt else None,
        model=response.model,
        topk_prompt_logprobs=(
            top_from(response.topk_prompt_logprobs) if response.HasField("topk_prompt_logprobs") else None
        ),
        target_prompt_logprobs=(
            numpy_from_tensor(response.target_prompt_logprobs, "target_prompt_logprobs")
            if response.HasField("target_prompt_logprobs")
            else None
        ),
        prompt_cache_hit_tokens=response.prompt_cache_hit_tokens,
    )
