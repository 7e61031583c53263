"""Completions: texts or tokens go on, one request may have many of them."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from treadle.v1 import sampling_pb2
from treadle.wire import encode_tokens
from treadle_gateway.http.exchange import Json, event_stream, read_json, until_gone
from treadle_gateway.http.faces import json_response
from treadle_gateway.http.openai import drawing
from treadle_gateway.http.openai.answers import (
    AboutPrompt,
    Echo,
    Frame,
    StreamedAnswer,
    TextShape,
    Usage,
    take_whole,
    whole_answer,
)
from treadle_gateway.http.openai.chat import MAX_BODY_BYTES, ends_of
from treadle_gateway.http.openai.choices import Choice, Drawn, drawn_tokens
from treadle_gateway.http.openai.models import Models
from treadle_gateway.http.openai.problems import body_of
from treadle_gateway.http.openai.requests import CompletionRequest, read_completion
from treadle_gateway.local_calls import LocalCalls
from treadle_gateway.text.text_stream import TextStream
from treadle_gateway.text.tokenizer import BaseTokenizer
from treadle_gateway.text.tokenizers import Tokenizers

_DEFAULT_TOKENS = 16


class Completions:
    """POST /v1/completions."""

    def __init__(self, calls: LocalCalls, models: Models, tokenizers: Tokenizers) -> None:
        self._calls = calls
        self._models = models
        self._tokenizers = tokenizers

    async def create(self, request: Request) -> Response:
        """Goes on with each prompt, whole or as it is drawn."""
        fields = read_completion(await read_json(request, MAX_BODY_BYTES))
        model = await self._models.find(fields.model)
        tokenizer = await self._tokenizers.get(model.base)
        prompts = await asyncio.to_thread(lambda: [_encode(tokenizer, prompt) for prompt in fields.prompts])
        limit = _DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens
        # Nothing may be drawn for a prompt that is only to be echoed; what is drawn then is thrown away.
        wanted = drawing.Wanted(
            model.name,
            fields.drawn,
            max(1, limit),
            fields.logprobs or 0,
            bool(fields.echo and fields.logprobs is not None),
        )
        frame = Frame(
            name=f"cmpl-{secrets.token_hex(16)}",
            model=model.name,
            tokenizer=tokenizer,
            stops=fields.stops,
            ends=ends_of(tokenizer, fields.stop_token_ids),
            with_logprobs=fields.logprobs is not None,
            include_usage=fields.include_usage,
        )
        answer = _Answer(fields, frame, prompts)
        requests = drawing.sample_requests(fields, wanted, prompts)
        if fields.stream:
            return await event_stream(request, self._events(frame, answer, requests), body_of)
        responses = await until_gone(request, drawing.draw(self._calls, requests))
        # Beside the loop: log-probs of many tokens take long to write.
        return json_response(await asyncio.to_thread(answer.whole_of, responses))

    async def _events(self, frame: Frame, answer: "_Answer", requests: drawing.Requests) -> AsyncGenerator[Json, None]:
        async with aclosing(drawing.draw_streaming(self._calls, requests)) as messages:
            async for chunk in answer.chunks(messages):
                yield chunk
        if frame.include_usage:
            yield answer.usage_chunk()


class _Answer(StreamedAnswer):
    """The choices of all prompts of a request, with the prompts before them where they are echoed."""

    def __init__(self, fields: CompletionRequest, frame: Frame, prompts: Sequence[list[int]]) -> None:
        self._fields = fields
        self._given = fields.prompts
        self._prompts = prompts
        self._echoes: dict[int, Echo] = {}
        self._frame = frame
        self._text_shape = TextShape(frame)
        super().__init__(frame, self._text_shape, fields.drawn, Usage(prompt=sum(map(len, prompts))))

    def begin(self, index: int, message: AboutPrompt) -> Choice:
        """Puts the prompt before a choice; of the messages of a prompt, the first tells about it."""
        place = index // self._fields.drawn
        if not self._fields.echo:
            return self._frame.choice(index)
        if place not in self._echoes:
            self._echoes[place] = self._echo(place, message)
        self._text_shape.echoes[index] = echo = self._echoes[place]
        return self._frame.choice(index, len(echo.text))

    def whole_of(self, responses: Sequence[sampling_pb2.SampleResponse]) -> Json:
        """Returns the answer from all samples; of `best_of` many the likeliest per token."""
        choices: list[Choice] = []
        for place, response in enumerate(responses):
            self.usage.cached += response.prompt_cache_hit_tokens
            drawn = [
                self._finished(self.begin(place * self._fields.drawn + number, response), sequence)
                for number, sequence in enumerate(response.sequences)
            ]
            self.usage.sampled += sum(choice.num_tokens for choice in drawn)
            if len(drawn) > self._fields.choices:
                drawn.sort(key=lambda choice: -choice.total_logprob / max(1, choice.num_tokens))
            for choice in drawn[: self._fields.choices]:
                choice.index = len(choices)
                choices.append(choice)
        return whole_answer(self._frame, self._text_shape, choices, self.usage)

    def _finished(self, choice: Choice, sequence: sampling_pb2.SampledSequence) -> Choice:
        if self._fields.max_tokens == 0:
            # Only the prompt was asked for; that one token had to be drawn is nobody's business.
            choice.finish_reason = "length"
            return choice
        return take_whole(choice, sequence)

    def _echo(self, place: int, about: AboutPrompt) -> Echo:
        tokenizer, tokens, given = self._frame.tokenizer, self._prompts[place], self._given[place]
        text = given if isinstance(given, str) else tokenizer.decode(tokens)
        if not self._frame.with_logprobs:
            return Echo(text)
        top = about.topk_prompt_logprobs if about.HasField("topk_prompt_logprobs") else None
        drawn = drawn_tokens(encode_tokens(np.array(tokens, np.int32)), about.prompt_logprobs, top)
        return Echo(text, _placed(drawn, tokenizer, text))


def _encode(tokenizer: BaseTokenizer, prompt: str | list[int]) -> list[int]:
    return tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt


def _placed(drawn: Sequence[Drawn], tokenizer: BaseTokenizer, text: str) -> list[Drawn]:
    """Returns a prompt's tokens with where each begins in its text; what the tokenizer put before it has no length."""
    stream: TextStream[int] = TextStream(())
    placed = []
    for number, one in enumerate(drawn):
        placed.append(replace(one, start=stream.length))
        content = tokenizer.token_bytes(one.token)
        added = not stream.length and tokenizer.is_special(one.token) and not text.startswith(content.decode())
        stream.push(number, b"" if added else content)
    return placed
