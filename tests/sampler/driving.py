"""Runs a decoder to its end and sorts what came out by request and sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from treadle_engine.decode import Decoder
from treadle_engine.decode_requests import DecodeEvent, FailedEvent, PromptEvent, SampleRequest, TokenEvent
from treadle_engine.stops import StopReason


@dataclass
class Outcome:
    """What one request got: by sample index, and of the prompt."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    stops: dict[int, StopReason] = field(default_factory=dict)
    prompt_logprobs_T: npt.NDArray[np.float32] | None = None
    error: str | None = None
    num_cached: int = 0


def collect(outcomes: dict[int, Outcome], events: Sequence[DecodeEvent]) -> None:
    """Add one step's events."""
    for event in events:
        outcome = outcomes.setdefault(event.request, Outcome())
        if isinstance(event, FailedEvent):
            outcome.error = event.error.reason
        elif isinstance(event, PromptEvent):
            outcome.prompt_logprobs_T = event.logprobs_T if event.logprobs_T.size else None
            outcome.num_cached = event.num_cached
        elif isinstance(event, TokenEvent):
            assert event.index not in outcome.stops, "a token after the last one"
            outcome.tokens.setdefault(event.index, []).append(event.token)
            outcome.logprobs.setdefault(event.index, []).append(event.logprob)
            if event.stop is not None:
                outcome.stops[event.index] = event.stop


def run(decoder: Decoder, requests: Sequence[SampleRequest], joins: Sequence[int] = ()) -> list[Outcome]:
    """Return the outcomes in order; request i joins after `joins[i]` steps (0 when not given)."""
    outcomes: dict[int, Outcome] = {}
    numbers: dict[int, int] = {}
    delays = [*joins, *[0] * (len(requests) - len(joins))]
    step = 0
    while decoder.has_work or len(numbers) < len(requests):
        for place, request in enumerate(requests):
            if place not in numbers and delays[place] <= step:
                numbers[place] = decoder.add(request)
        collect(outcomes, decoder.step())
        step += 1
    return [outcomes[numbers[place]] for place in range(len(requests))]
