"""The bytes that each token stands for, from what a tokenizer's decoder says of itself.

Tokens are pieces of bytes, not of text: a character may lie across several. Bytes can be joined, cut and shown to a
caller; text comes from them by an ordinary UTF-8 decoder. Knows no strings of more than one token.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

Op = Callable[[bytes], bytes]
_BYTE_TOKEN: Final = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


class UnknownDecoder(ValueError):  # noqa: N818  Says which one.
    """A decoder whose tokens have no bytes of their own."""


def _byte_alphabet() -> dict[str, int]:
    """Returns the bytes behind the characters in which byte-level vocabularies are written (those of GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_ALPHABET: Final = _byte_alphabet()


def decoder_ops(decoder: Mapping[str, Any] | None) -> Sequence[Op]:
    """Returns what turns a token's UTF-8 entry in the vocabulary into its bytes, step by step.

    Args:
        decoder: the `decoder` object of a tokenizer.json.

    What a decoder does to the beginning of a whole text only (to strip one space) is left out: a continuation has its
    beginning elsewhere.

    Raises:
        UnknownDecoder: the decoder is absent or of a kind that joins tokens by more than their bytes.
    """
    kind = decoder["type"] if decoder else None
    if decoder is None or kind is None:
        raise UnknownDecoder("the tokenizer has no decoder")
    if kind == "Sequence":
        return [op for part in decoder["decoders"] for op in decoder_ops(part)]
    if kind in ("Fuse", "Strip"):
        return []
    if kind == "ByteLevel":
        return [_from_byte_level]
    if kind == "ByteFallback":
        return [_from_byte_token]
    if kind == "Metaspace":
        return [_replacing(decoder["replacement"], " ")]
    if kind == "Replace" and "String" in decoder["pattern"]:
        return [_replacing(decoder["pattern"]["String"], decoder["content"])]
    raise UnknownDecoder(f"the tokenizer's decoder is of the kind {kind}")


def _from_byte_level(entry: bytes) -> bytes:
    text = entry.decode()
    if all(character in _ALPHABET for character in text):
        return bytes(_ALPHABET[character] for character in text)
    return entry  # An added token, written as it is.


def _from_byte_token(entry: bytes) -> bytes:
    match = _BYTE_TOKEN.fullmatch(entry)
    return bytes([int(match[1], 16)]) if match else entry


def _replacing(old: str, new: str) -> Op:
    before, after = old.encode(), new.encode()
    return lambda entry: entry.replace(before, after)
