"""Rendezvous hashing: everybody who knows the same members ranks them the same for a key, without asking anybody.

Knows nothing of what members and keys are.
"""

from collections.abc import Iterable
from hashlib import blake2b


def rank(key: str, members: Iterable[str]) -> list[str]:
    """Returns the members, best for the key first; removing one moves only the keys that it had."""

    def score(member: str) -> bytes:
        return blake2b(f"{member}\0{key}".encode(), digest_size=8).digest()

    return sorted(members, key=score, reverse=True)
