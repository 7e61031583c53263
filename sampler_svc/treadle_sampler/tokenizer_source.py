"""The base's tokenizer as others get it: read when first asked for, then kept. Knows nothing of who asks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from treadle.errors import make_error
from treadle.v1 import sampling_pb2
from treadle_engine.base_model import BaseInfo
from treadle_engine.errors import EngineError
from treadle_engine.tokenizer_files import read_tokenizer


@dataclass(frozen=True)
class SentTokenizer:
    """What is sent: a header and a tokenizer.json."""

    header: sampling_pb2.TokenizerHeader
    content: bytes = field(repr=False)


class TokenizerSource:
    """Gives the tokenizer of one base."""

    def __init__(self, info: BaseInfo) -> None:
        self._info = info
        self._reading = asyncio.Lock()
        self._sent: SentTokenizer | None = None

    async def get(self) -> SentTokenizer:
        """Returns the tokenizer; raises UNKNOWN_BASE when the base has none that can be sent."""
        async with self._reading:
            if self._sent is None:
                try:
                    self._sent = await asyncio.to_thread(self._read)
                except EngineError as error:
                    raise make_error(error.reason, error.message) from error
        return self._sent

    def _read(self) -> SentTokenizer:
        files = read_tokenizer(self._info.path)
        header = sampling_pb2.TokenizerHeader(
            sha256=files.sha256,
            size=len(files.content),
            chat_template=files.chat_template,
            special_tokens=files.special_tokens,
            eos_token_ids=self._info.eos_token_ids,
            max_context=self._info.max_context,
            vocab_size=self._info.vocab_size,
        )
        return SentTokenizer(header, files.content)
