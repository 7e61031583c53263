"""The tokenizers of served bases, fetched from their samplers when first asked for and kept. Knows nothing of HTTP."""

import asyncio
from contextlib import aclosing
from typing import Any, Final

import google_crc32c

from treadle.errors import make_error
from treadle.v1 import sampling_pb2
from treadle_gateway.cache import AsyncCache
from treadle_gateway.local_calls import LocalCalls
from treadle_gateway.text.token_bytes import UnknownDecoder
from treadle_gateway.text.tokenizer import BaseTokenizer, TokenizerFacts

# How long a base's tokenizer is used before its sampler is asked whether it is still the same.
_FRESH_SECONDS: Final = 60.0
_FETCH_SECONDS: Final = 60.0
_KEPT: Final = 32


class Tokenizers:
    """Gives the tokenizer of a base."""

    def __init__(self, calls: LocalCalls) -> None:
        self._calls = calls
        self._fresh: AsyncCache[str, BaseTokenizer] = AsyncCache(_FRESH_SECONDS, max_entries=_KEPT)
        self._known: dict[str, BaseTokenizer] = {}

    async def get(self, base: str) -> BaseTokenizer:
        """Returns a base's tokenizer; MODEL_NOT_FOUND, UNKNOWN_BASE, and what sampling raises when nobody is there."""
        return await self._fresh.get(base, lambda: self._fetch(base))

    async def _fetch(self, base: str) -> BaseTokenizer:
        known = self._known.get(base)
        request = sampling_pb2.GetTokenizerRequest(model=base, known_sha256=known.facts.sha256 if known else "")
        # Any: a stub's stream call is an async generator here; its stub file says otherwise.
        call: Any = self._calls.sampling.GetTokenizer(request, timeout=_FETCH_SECONDS)
        async with aclosing(call) as frames:
            header = (await anext(frames)).header
            if known is not None and header.sha256 == known.facts.sha256:
                return known
            content = b"".join([_checked(frame.chunk) async for frame in frames])
        if len(content) != header.size:
            raise make_error(
                "CHECKSUM_MISMATCH", f"{len(content)} of {header.size} bytes of a tokenizer came; try again"
            )
        facts = TokenizerFacts(
            header.sha256,
            content,
            header.chat_template,
            dict(header.special_tokens),
            frozenset(header.eos_token_ids),
            header.max_context,
            header.vocab_size,
        )
        try:
            made = await asyncio.to_thread(BaseTokenizer, facts)
        except UnknownDecoder as error:
            raise make_error("UNKNOWN_BASE", f"texts of the base {base} cannot be made here: {error}") from error
        if len(self._known) >= _KEPT:
            self._known.pop(next(iter(self._known)))
        self._known[base] = made
        return made


def _checked(chunk: sampling_pb2.TokenizerChunk) -> bytes:
    if google_crc32c.value(chunk.data) != chunk.crc32c:
        raise make_error("CHECKSUM_MISMATCH", "a chunk of a tokenizer was damaged on its way; try again")
    return chunk.data
