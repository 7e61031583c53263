"""The servicers: proto to request, events to proto. Knows nothing of how tokens are drawn."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt

from treadle import wire
from treadle.errors import make_error
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc
from treadle.tensors import tensor_from_numpy
from treadle.v1 import sampling_pb2, sampling_pb2_grpc, types_pb2
from treadle_engine.decode_requests import PromptEvent, SampleRequest, TokenEvent
from treadle_engine.sampling_params import MAX_SAMPLES, SamplingParams
from treadle_sampler.sampler import Sampler
from treadle_service.principal import current_principal

Context = grpc.aio.ServicerContext[Any, Any]  # Message types follow from the method.
_LISTED_STEPS: Final = 1000
_STOPS: Final = {
    None: sampling_pb2.STOP_REASON_UNSPECIFIED,
    "stop": sampling_pb2.STOP_REASON_STOP,
    "length": sampling_pb2.STOP_REASON_LENGTH,
}


class SamplerSlot:
    """Holds the sampler once its base is loaded."""

    def __init__(self) -> None:
        self._sampler: Sampler | None = None

    def fill(self, sampler: Sampler) -> None:
        """Lets calls in."""
        self._sampler = sampler

    def get(self) -> Sampler:
        """Returns the sampler; UNAVAILABLE while the base is loading."""
        if self._sampler is None:
            raise make_error("UNAVAILABLE", "the base is still loading; try again", 1.0)
        return self._sampler


@dataclass
class _Sequence:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: sampling_pb2.StopReason = sampling_pb2.STOP_REASON_UNSPECIFIED


class SamplingServicer(sampling_pb2_grpc.SamplingServiceServicer):
    """treadle.v1.SamplingService."""

    def __init__(self, slot: SamplerSlot) -> None:
        self._slot = slot

    async def Sample(self, request: sampling_pb2.SampleRequest, context: Context) -> sampling_pb2.SampleResponse:
        """Answers when all samples are finished."""
        wanted = read_request(request)
        sequences = [_Sequence() for _ in range(wanted.num_samples)]
        left = len(sequences)
        response = sampling_pb2.SampleResponse(model=request.model)
        as_list = request.prompt.WhichOneof("form") == "list"
        async with aclosing(self._slot.get().run(request.model, current_principal(), wanted)) as events:
            async for event in events:
                if isinstance(event, PromptEvent):
                    _put_prompt_logprobs(response, event.logprobs_T, as_list)
                elif isinstance(event, TokenEvent):
                    sequence = sequences[event.index]
                    sequence.tokens.append(event.token)
                    sequence.logprobs.append(event.logprob)
                    sequence.stop = _STOPS[event.stop]
                    left -= event.stop is not None
                if not left:
                    break
        response.sequences.extend(_sequence(sequence, as_list) for sequence in sequences)
        return response

    async def StreamSample(
        self, request: sampling_pb2.StreamSampleRequest, context: Context
    ) -> AsyncIterator[sampling_pb2.StreamSampleResponse]:
        """Answers token by token."""
        asked = request.request
        wanted = read_request(asked)
        left = wanted.num_samples
        as_list = asked.prompt.WhichOneof("form") == "list"
        # On the first message of all.
        first = sampling_pb2.StreamSampleResponse(model=asked.model)
        async with aclosing(self._slot.get().run(asked.model, current_principal(), wanted)) as events:
            async for event in events:
                if isinstance(event, PromptEvent):
                    first.prompt_logprobs.CopyFrom(tensor_from_numpy(event.logprobs_T))
                elif isinstance(event, TokenEvent):
                    message = sampling_pb2.StreamSampleResponse(
                        index=event.index,
                        tokens=_tokens([event.token], as_list),
                        logprobs=tensor_from_numpy(np.array([event.logprob], dtype=np.float32)),
                        stop_reason=_STOPS[event.stop],
                    )
                    message.MergeFrom(first)
                    first.Clear()
                    yield message
                    left -= event.stop is not None
                if not left:
                    break

    async def ComputeLogprobs(
        self, request: sampling_pb2.ComputeLogprobsRequest, context: Context
    ) -> sampling_pb2.ComputeLogprobsResponse:
        """Answers the log-probs of a sequence."""
        wanted = SampleRequest(wire.decode_tokens(request.tokens), num_samples=0)
        response = sampling_pb2.ComputeLogprobsResponse(model=request.model)
        async with aclosing(self._slot.get().run(request.model, current_principal(), wanted)) as events:
            async for event in events:
                if isinstance(event, PromptEvent):
                    if request.tokens.WhichOneof("form") == "list":
                        response.logprobs_list.extend(np.nan_to_num(event.logprobs_T).tolist())
                    else:
                        response.logprobs.CopyFrom(tensor_from_numpy(event.logprobs_T))
                    break
        return response


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """treadle.internal.v1.SamplerService."""

    def __init__(self, slot: SamplerSlot) -> None:
        self._slot = slot

    async def GetSamplerStatus(
        self, request: sampler_pb2.GetSamplerStatusRequest, context: Context
    ) -> sampler_pb2.GetSamplerStatusResponse:
        """Answers load and cached revisions."""
        current_principal().require("internal")
        sampler = self._slot.get()
        load = sampler.engine.load
        response = sampler_pb2.GetSamplerStatusResponse(
            cached_revisions=sampler.cache.names,
            active_sequences=load.num_active,
            waiting_sequences=load.num_waiting,
            num_steps=load.num_steps,
            num_tokens=load.num_tokens,
        )
        response.busy.FromNanoseconds(int(sampler.engine.trace.busy_seconds * 1e9))
        return response

    async def ListDecodeSteps(
        self, request: sampler_pb2.ListDecodeStepsRequest, context: Context
    ) -> sampler_pb2.ListDecodeStepsResponse:
        """Answers the last steps."""
        current_principal().require("internal")
        response = sampler_pb2.ListDecodeStepsResponse()
        for step in self._slot.get().engine.trace.last(request.limit or _LISTED_STEPS):
            listed = response.steps.add(num_sequences=step.num_sequences, num_tokens=step.num_tokens)
            listed.started.FromNanoseconds(int(step.started * 1e9))
            listed.took.FromNanoseconds(int(step.took * 1e9))
        return response

    async def PrefetchRevision(
        self, request: sampler_pb2.PrefetchRevisionRequest, context: Context
    ) -> sampler_pb2.PrefetchRevisionResponse:
        """Answers when the revision is in memory."""
        principal = current_principal()
        principal.require("internal")
        async with self._slot.get().model(request.name, principal):
            return sampler_pb2.PrefetchRevisionResponse()


def read_request(request: sampling_pb2.SampleRequest) -> SampleRequest:
    """Returns the request without its model; an absent seed becomes a fresh one."""
    params = request.params
    if request.num_samples > MAX_SAMPLES:  # refused here too: answers are laid out before the decoder sees the request
        raise make_error("BAD_SAMPLING_PARAMS", f"num_samples must be 1..{MAX_SAMPLES}, got {request.num_samples}")
    return SampleRequest(
        prompt_T=wire.decode_tokens(request.prompt),
        params=SamplingParams(
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_k=params.top_k,
            top_p=params.top_p if params.HasField("top_p") else 1.0,
            seed=params.seed if params.HasField("seed") else secrets.randbits(64),
            stop_strings=tuple(params.stop_strings),
            stop_tokens=tuple(params.stop_tokens),
            ignore_eos=params.ignore_eos,
        ),
        num_samples=request.num_samples or 1,
        prompt_logprobs=request.prompt_logprobs,
    )


def _sequence(sequence: _Sequence, as_list: bool) -> sampling_pb2.SampledSequence:
    message = sampling_pb2.SampledSequence(tokens=_tokens(sequence.tokens, as_list), stop_reason=sequence.stop)
    if as_list:
        message.logprobs_list.extend(sequence.logprobs)
    else:
        message.logprobs.CopyFrom(tensor_from_numpy(np.array(sequence.logprobs, dtype=np.float32)))
    return message


def _tokens(tokens: list[int], as_list: bool) -> types_pb2.Tokens:
    if as_list:
        return types_pb2.Tokens(list=types_pb2.TokenList(ids=tokens))
    return wire.encode_tokens(np.array(tokens, dtype=np.int32))


def _put_prompt_logprobs(
    response: sampling_pb2.SampleResponse, logprobs_T: npt.NDArray[np.float32], as_list: bool
) -> None:
    if as_list:
        # JSON has no NaN that every reader takes; the first entry means nothing either way.
        response.prompt_logprobs_list.extend(np.nan_to_num(logprobs_T).tolist())
    else:
        response.prompt_logprobs.CopyFrom(tensor_from_numpy(logprobs_T))
