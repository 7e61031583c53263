"""From tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string.

Text is held back for two reasons: a character whose last bytes have not come, and an end that may be the beginning of
a stop string. Everything else goes out at once. Knows nothing of probabilities and messages.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece(Generic[T]):
    """Text that may be shown, and the tokens that it completes."""

    text: str
    tokens: Sequence[T]


class TextStream(Generic[T]):
    """The text of one sample; `T` is what the caller keeps of a token, given back with the text that ends there."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""  # decoded, not shown
        self._waiting: deque[tuple[T, int]] = deque()  # tokens, with the length that shown text has at their end
        self._shown = 0  # characters
        self._released = 0  # where the last token that was given back ends
        self.stopped = False

    @property
    def length(self) -> int:
        """How many characters the text has so far, held ones included."""
        return self._shown + len(self._held)

    def push(self, token: T, content: bytes) -> Piece[T]:
        """Takes a token; returns what can be shown now. Once `stopped` nothing more comes."""
        if self.stopped:
            return Piece("", ())
        self._held += self._decoder.decode(content)
        # A token that ends within a character ends, for those who read, behind it.
        within = bool(self._decoder.getstate()[0])
        self._waiting.append((token, self.length + within))
        return self._show_if_stopped() or self._show(len(self._held) - self._overlap())

    def finish(self) -> Piece[T]:
        """Returns what was held back; a character that was never completed shows as U+FFFD."""
        if self.stopped:
            return Piece("", ())
        self._held += self._decoder.decode(b"", final=True)
        return self._show_if_stopped() or self._show(len(self._held))

    def _show_if_stopped(self) -> Piece[T] | None:
        """Returns the text before the first stop string, None if there is none."""
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if not found:
            return None
        self.stopped = True
        piece = self._show(min(found))
        # Of a token that the stop string begins in, something shows: it belongs to the text.
        cut = [self._waiting.popleft()[0]] if self._waiting and self._released < self._shown else []
        return Piece(piece.text, [*piece.tokens, *cut])

    def _overlap(self) -> int:
        """Returns how many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _show(self, length: int) -> Piece[T]:
        """Releases `length` characters, and the tokens that lie within all that was released."""
        text, self._held = self._held[:length], self._held[length:]
        self._shown += length
        tokens = []
        while self._waiting and self._waiting[0][1] <= self._shown:
            token, self._released = self._waiting.popleft()
            tokens.append(token)
        return Piece(text, tokens)
