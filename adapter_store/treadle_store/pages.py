"""Opaque page tokens: where a listing goes on, as base64 of a JSON list. Knows nothing of what is listed."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from treadle.errors import make_error

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 500


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page of a listing is wanted."""

    size: int
    token: str

    @property
    def limit(self) -> int:
        """How many entries the page holds; a size of 0 takes the default, a huge one is cut."""
        return min(self.size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def encode_token(created_us: int, ids: Sequence[str]) -> str:
    """Returns the token of the page behind the entry that was created then and is called so."""
    return base64.urlsafe_b64encode(json.dumps([created_us, *ids]).encode()).decode()


def decode_token(token: str, num_ids: int) -> tuple[int, list[str]]:
    """Returns what encode_token was given, or raises BAD_PAGE_TOKEN."""
    try:
        created_us, *ids = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        created_us, ids = None, []
    whole = type(created_us) is int and abs(created_us) < 2**63 and len(ids) == num_ids
    if not whole or not all(isinstance(part, str) for part in ids):
        raise make_error("BAD_PAGE_TOKEN", "page_token is not one that this service gave; start again without it")
    return created_us, ids
