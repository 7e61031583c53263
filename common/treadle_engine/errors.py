"""The one exception of the engine.

Whatever a caller can get wrong (a shape, a token, a configuration, a file) ends in an `EngineError` whose
`reason` is a stable word. This module does not know how a reason is told to a client.
"""

from __future__ import annotations


class EngineError(ValueError):
    """A request that the engine refuses; `reason` is UPPER_SNAKE and stable, `message` is for people."""

    def __init__(self, reason: str, message: str) -> None:
        """Keep the reason and the message; `str()` shows both."""
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[EngineError], tuple[str, str]]:
        """Pickle by the two arguments, so that the error survives a process boundary."""
        return (EngineError, (self.reason, self.message))
