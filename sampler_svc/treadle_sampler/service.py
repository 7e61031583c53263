"""The servicers: proto to request, events to proto. Knows nothing of how tokens are drawn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import google_crc32c
import grpc

from treadle import wire
from treadle.errors import make_error
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc
from treadle.tensors import tensor_from_numpy
from treadle.v1 import sampling_pb2, sampling_pb2_grpc
from treadle_engine.decode_requests import FailedEvent, PromptEvent, SampleRequest
from treadle_sampler.answers import Answer, StreamedAnswer, read_request, without_nan
from treadle_sampler.sampler import Sampler
from treadle_service.principal import current_principal

Context = grpc.aio.ServicerContext[Any, Any]  # Message types follow from the method.
_LISTED_STEPS: Final = 1000
_CHUNK_BYTES: Final = 2**20


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


class SamplingServicer(sampling_pb2_grpc.SamplingServiceServicer):
    """treadle.v1.SamplingService."""

    def __init__(self, slot: SamplerSlot) -> None:
        self._slot = slot

    async def Sample(self, request: sampling_pb2.SampleRequest, context: Context) -> sampling_pb2.SampleResponse:
        """Answers when all samples are finished."""
        wanted = read_request(request)
        answer = Answer(request, wanted)
        async with aclosing(self._slot.get().run(request.model, current_principal(), wanted)) as events:
            async for event in events:
                if not isinstance(event, FailedEvent):
                    answer.add(event)
                if answer.is_complete:
                    break
        return answer.message()

    async def StreamSample(
        self, request: sampling_pb2.StreamSampleRequest, context: Context
    ) -> AsyncIterator[sampling_pb2.StreamSampleResponse]:
        """Answers token by token."""
        wanted = read_request(request.request)
        answer = StreamedAnswer(request.request, wanted)
        async with aclosing(self._slot.get().run(request.request.model, current_principal(), wanted)) as events:
            async for event in events:
                if not isinstance(event, FailedEvent) and (message := answer.add(event)) is not None:
                    yield message
                if answer.is_complete:
                    break

    async def ComputeLogprobs(
        self, request: sampling_pb2.ComputeLogprobsRequest, context: Context
    ) -> sampling_pb2.ComputeLogprobsResponse:
        """Answers the log-probs of a sequence."""
        last_n = request.prompt_logprobs_last_n if request.HasField("prompt_logprobs_last_n") else None
        wanted = SampleRequest(wire.decode_tokens(request.tokens), num_samples=0, last_n=last_n)
        response = sampling_pb2.ComputeLogprobsResponse(model=request.model)
        async with aclosing(self._slot.get().run(request.model, current_principal(), wanted)) as events:
            async for event in events:
                if isinstance(event, PromptEvent):
                    if request.tokens.WhichOneof("form") == "list":
                        response.logprobs_list.extend(without_nan(event.logprobs_T))
                    else:
                        response.logprobs.CopyFrom(tensor_from_numpy(event.logprobs_T))
                    break
        return response

    async def GetTokenizer(
        self, request: sampling_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[sampling_pb2.GetTokenizerResponse]:
        """Answers the tokenizer of the base, whose name or revision the caller gives."""
        sampler = self._slot.get()
        async with sampler.model(request.model, current_principal()):
            facts = await sampler.tokenizer.get()
        yield sampling_pb2.GetTokenizerResponse(header=facts.header)
        if request.known_sha256 != facts.header.sha256:
            for start in range(0, len(facts.content), _CHUNK_BYTES):
                data = facts.content[start : start + _CHUNK_BYTES]
                chunk = sampling_pb2.TokenizerChunk(crc32c=google_crc32c.value(data), data=data)
                yield sampling_pb2.GetTokenizerResponse(chunk=chunk)


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
        steps = self._slot.get().engine.trace.last(request.limit or _LISTED_STEPS, request.after.ToNanoseconds())
        for step in steps:
            listed = response.steps.add(
                num_sequences=step.num_sequences, num_tokens=step.num_tokens, sequences_by_tenant=step.owners
            )
            listed.started.FromNanoseconds(step.started_ns)
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
