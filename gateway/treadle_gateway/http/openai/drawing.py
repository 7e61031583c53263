"""From a request's fields to samples: one request to the sampler per prompt, whole or token by token.

Knows the sampler's messages and none of OpenAI's.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from treadle.v1 import sampling_pb2
from treadle.wire import encode_tokens
from treadle_gateway.http.openai.requests import SamplingFields
from treadle_gateway.local_calls import LocalCalls

# Prompts of one request that are sampled at once.
_AT_ONCE: Final = 16
# An odd number far from others: prompts of one seed must not draw alike.
_SEED_STRIDE: Final = 0x9E3779B97F4A7C15
_WAITING: Final = 64


Requests = Sequence[sampling_pb2.SampleRequest]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is drawn of every prompt."""

    model: str
    num_samples: int
    max_tokens: int | None
    num_top: int = 0
    about_prompt: bool = False  # with the log-probs of the prompt's own tokens


def sample_requests(
    fields: SamplingFields, wanted: Wanted, prompts: Sequence[Sequence[int]]
) -> list[sampling_pb2.SampleRequest]:
    """Returns one request per prompt. Each has a seed of its own, so that a lost call may be repeated."""
    seed = secrets.randbits(64) if fields.seed is None else fields.seed
    requests = []
    for place, prompt in enumerate(prompts):
        requests.append(
            sampling_pb2.SampleRequest(
                model=wanted.model,
                prompt=encode_tokens(np.array(prompt, dtype=np.int32)),
                num_samples=wanted.num_samples,
                params=_params(fields, wanted.max_tokens, (seed + place * _SEED_STRIDE) % 2**64),
                topk_logprobs=wanted.num_top,
                prompt_logprobs=wanted.about_prompt,
                topk_prompt_logprobs=wanted.num_top if wanted.about_prompt else 0,
            )
        )
    return requests


async def draw(calls: LocalCalls, requests: Requests) -> list[sampling_pb2.SampleResponse]:
    """Returns the samples of all prompts; when one fails, or the caller goes, the others are cancelled."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(request: sampling_pb2.SampleRequest) -> sampling_pb2.SampleResponse:
        async with places:
            return await calls.sampling.Sample(request)

    tasks = [asyncio.create_task(one(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def draw_streaming(
    calls: LocalCalls, requests: Requests
) -> AsyncGenerator[tuple[int, sampling_pb2.StreamSampleResponse], None]:
    """Yields new tokens of all prompts as they come, each with its prompt's place."""
    if len(requests) == 1:
        async with aclosing(_stream(calls, requests[0])) as messages:
            async for message in messages:
                yield 0, message
        return
    arrived: asyncio.Queue[tuple[int, sampling_pb2.StreamSampleResponse] | None] = asyncio.Queue()
    # What the reader has not taken yet is bounded: a slow one slows the samplers.
    room, places = asyncio.Semaphore(_WAITING), asyncio.Semaphore(_AT_ONCE)

    async def read(place: int, request: sampling_pb2.SampleRequest) -> None:
        async with places, aclosing(_stream(calls, request)) as messages:
            async for message in messages:
                await room.acquire()
                arrived.put_nowait((place, message))

    async def read_all() -> None:
        async with asyncio.TaskGroup() as group:
            for place, request in enumerate(requests):
                group.create_task(read(place, request))

    reading = asyncio.create_task(read_all())
    reading.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (item := await arrived.get()) is not None:
            room.release()
            yield item
        await _raise_first(reading)
    finally:
        reading.cancel()


async def _raise_first(reading: asyncio.Task[None]) -> None:
    """Raises the first error of a finished group as it was."""
    try:
        await reading
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _stream(
    calls: LocalCalls, request: sampling_pb2.SampleRequest
) -> AsyncGenerator[sampling_pb2.StreamSampleResponse, None]:
    # Any: a stub's stream call is an async generator here; its stub file says otherwise.
    call: Any = calls.sampling.StreamSample(sampling_pb2.StreamSampleRequest(request=request))
    messages: AsyncIterator[sampling_pb2.StreamSampleResponse]
    async with aclosing(call) as messages:
        async for message in messages:
            yield message


def _params(fields: SamplingFields, max_tokens: int | None, seed: int) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.temperature,
        top_k=fields.top_k or 0,
        top_p=fields.top_p,
        seed=seed,
        stop_strings=fields.stops,
        stop_tokens=fields.stop_token_ids or (),
        ignore_eos=bool(fields.ignore_eos),
        min_p=fields.min_p or 0.0,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=fields.biases,
    )
