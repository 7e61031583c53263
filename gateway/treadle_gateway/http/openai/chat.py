"""Chat completions: a conversation becomes a prompt by the base's own template, its answers become messages."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from treadle.v1 import sampling_pb2
from treadle_gateway.http.exchange import Json, event_stream, read_json, until_gone
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.openai import drawing
from treadle_gateway.http.openai.answers import ChatShape, Frame, StreamedAnswer, Usage, take_whole, whole_answer
from treadle_gateway.http.openai.models import Models
from treadle_gateway.http.openai.problems import FieldError, body_of
from treadle_gateway.http.openai.requests import ChatRequest, read_chat
from treadle_gateway.http.openai.stored import Stored
from treadle_gateway.local_calls import LocalCalls
from treadle_gateway.text.chat_template import TemplateProblem
from treadle_gateway.text.tokenizer import BaseTokenizer
from treadle_gateway.text.tokenizers import Tokenizers

MAX_BODY_BYTES: Final = 8 * 2**20


class ChatCompletions:
    """POST /v1/chat/completions."""

    def __init__(self, calls: LocalCalls, models: Models, tokenizers: Tokenizers, stored: Stored) -> None:
        self._calls = calls
        self._models = models
        self._tokenizers = tokenizers
        self._stored = stored

    async def create(self, request: Request) -> Response:
        """Answers a conversation, whole or as it is drawn, and keeps it if that is asked for and agreed to."""
        fields = read_chat(await read_json(request, MAX_BODY_BYTES))
        model = await self._models.find(fields.model)
        tokenizer = await self._tokenizers.get(model.base)
        if fields.store:
            # Refused before anything is drawn.
            await self._stored.check(fields)
        prompt = await asyncio.to_thread(_prompt, tokenizer, fields)
        num_top = (fields.top_logprobs or 0) if fields.logprobs else 0
        wanted = drawing.Wanted(model.name, fields.choices, fields.limit, num_top)
        requests = drawing.sample_requests(fields, wanted, [prompt])
        frame = Frame(
            # Begins with the time, so that kept completions are in its order.
            name=f"chatcmpl-{time.time_ns() // 1000:016x}{secrets.token_hex(8)}",
            model=model.name,
            tokenizer=tokenizer,
            stops=fields.stops,
            ends=ends_of(tokenizer, fields.stop_token_ids),
            with_logprobs=bool(fields.logprobs),
            include_usage=fields.include_usage,
        )
        usage = Usage(prompt=len(prompt))
        shape = ChatShape(frame)
        if fields.stream:
            answer = StreamedAnswer(frame, shape, fields.choices, usage)
            return await event_stream(request, self._events(fields, frame, answer, requests), body_of)
        (response,) = await until_gone(request, drawing.draw(self._calls, requests))
        # Beside the loop: log-probs of many tokens take long to write.
        whole = await asyncio.to_thread(_whole, frame, shape, usage, response)
        if fields.store:
            whole = await self._stored.keep(fields, whole)
        return json_response(whole)

    async def _events(
        self, fields: ChatRequest, frame: Frame, answer: StreamedAnswer, requests: drawing.Requests
    ) -> AsyncGenerator[Json, None]:
        async with aclosing(drawing.draw_streaming(self._calls, requests)) as messages:
            async for chunk in answer.chunks(messages):
                yield chunk
        if fields.store:
            # Before the end is told: who hears of it finds the completion kept.
            await self._stored.keep(fields, answer.whole())
        if frame.include_usage:
            yield answer.usage_chunk()


def _whole(frame: Frame, shape: ChatShape, usage: Usage, response: sampling_pb2.SampleResponse) -> Json:
    usage.cached = response.prompt_cache_hit_tokens
    choices = [take_whole(frame.choice(index), sequence) for index, sequence in enumerate(response.sequences)]
    usage.sampled = sum(choice.num_tokens for choice in choices)
    return whole_answer(frame, shape, choices, usage)


def ends_of(tokenizer: BaseTokenizer, stop_token_ids: list[int] | None) -> frozenset[int]:
    """Returns the tokens that end a text and are no part of it."""
    return tokenizer.facts.eos_token_ids | frozenset(stop_token_ids or ())


def _prompt(tokenizer: BaseTokenizer, fields: ChatRequest) -> list[int]:
    try:
        text = tokenizer.render_chat(
            [message.for_template() for message in fields.messages],
            fields.chat_template_kwargs,
            add_generation_prompt=not fields.continue_final_message and fields.add_generation_prompt is not False,
            continue_final_message=bool(fields.continue_final_message),
        )
    except TemplateProblem as problem:
        raise FieldError(str(problem), "messages", "invalid_value") from problem
    return tokenizer.encode(text, add_special_tokens=False)
