"""A base's tokenizer as the gateway uses it: text to tokens, tokens to bytes, conversations to text.

Made of what a sampler tells about its base, so that it is the sampler's own tokenizer. Knows no files and no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from treadle_gateway.text.chat_template import Message, TemplateProblem, render
from treadle_gateway.text.token_bytes import decoder_ops

_CACHED_TOKENS = 1 << 17


@dataclass(frozen=True)
class TokenizerFacts:
    """What a base's tokenizer is made of, and what else its users ask for."""

    sha256: str
    content: bytes = field(repr=False)  # tokenizer.json
    chat_template: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: frozenset[int] = frozenset()
    max_context: int = 0
    vocab_size: int = 0


class BaseTokenizer:
    """One base's tokenizer; may be used from several threads.

    Raises UnknownDecoder for a tokenizer whose tokens have no bytes of their own.
    """

    def __init__(self, facts: TokenizerFacts) -> None:
        self.facts = facts
        self._tokenizer = Tokenizer.from_str(facts.content.decode())
        described = json.loads(facts.content)
        self._ops = decoder_ops(described.get("decoder"))
        self._special = frozenset(token["id"] for token in described.get("added_tokens", ()) if token["special"])
        # One memory per tokenizer: most tokens of an answer are among those of the answers before.
        self._bytes_of = lru_cache(_CACHED_TOKENS)(self._look_up)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the tokens of a text, with those that the tokenizer puts around it if asked for."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one token; none for an id without an entry."""
        return self._bytes_of(token)

    def is_special(self, token: int) -> bool:
        """Tells whether a token stands for structure rather than text."""
        return token in self._special or token in self.facts.eos_token_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""
        return b"".join(map(self._bytes_of, tokens)).decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,  # Any: variables of a template.
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Returns the text of a conversation; raises TemplateProblem, also when the base has no chat template."""
        if not self.facts.chat_template:
            raise TemplateProblem("this base has no chat template; use completions")
        return render(
            self.facts.chat_template,
            messages,
            special_tokens=self.facts.special_tokens,
            options=options,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def _look_up(self, token: int) -> bytes:
        entry = self._tokenizer.id_to_token(token)
        content = b"" if entry is None else entry.encode()
        for op in self._ops:
            content = op(content)
        return content
