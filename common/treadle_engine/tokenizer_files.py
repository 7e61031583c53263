"""A base's tokenizer as data, for those who have no torch: tokenizer.json, chat template and special tokens.

They are taken from the loaded tokenizer, not from files: a folder may spell them in several ways, and this is what
the base's own process uses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from treadle_engine.stops import load_fast_tokenizer


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as data; `sha256` is over all of it."""

    content: bytes
    chat_template: str
    special_tokens: Mapping[str, str]
    sha256: str


def read_tokenizer(path_or_name: str) -> TokenizerFiles:
    """Return a base's tokenizer as data; UNKNOWN_BASE if it has no fast one."""
    tokenizer = load_fast_tokenizer(path_or_name)
    content = tokenizer.backend_tokenizer.to_str().encode()
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template.get("default", "")
    special_tokens = dict(tokenizer.special_tokens_map)
    digest = hashlib.sha256(content)
    digest.update(json.dumps([template, special_tokens], sort_keys=True).encode())
    return TokenizerFiles(content, template, special_tokens, digest.hexdigest())
