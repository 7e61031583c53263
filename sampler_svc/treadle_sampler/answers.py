"""Requests and answers of sampling as the engine and as the wire have them. Knows nothing of calls or models."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from treadle import wire
from treadle.errors import make_error
from treadle.tensors import numpy_from_tensor, tensor_from_numpy
from treadle.v1 import sampling_pb2, types_pb2
from treadle_engine.decode_requests import PromptEvent, SampleRequest, TokenEvent, TopTokens
from treadle_engine.sampling_params import MAX_SAMPLES, SamplingParams

_STOPS: Final = {
    None: sampling_pb2.STOP_REASON_UNSPECIFIED,
    "stop": sampling_pb2.STOP_REASON_STOP,
    "length": sampling_pb2.STOP_REASON_LENGTH,
}
# An answer is one message, which may have 4 MiB: tables of log-probs leave room for the rest.
_MAX_TABLE_BYTES = 3 * 2**20


def read_request(request: sampling_pb2.SampleRequest) -> SampleRequest:
    """Returns the request without its model; an absent seed becomes a fresh one. Raises TreadleError."""
    if request.num_samples > MAX_SAMPLES:  # refused here too: answers are laid out before the decoder sees the request
        raise make_error("BAD_SAMPLING_PARAMS", f"num_samples must be 1..{MAX_SAMPLES}, got {request.num_samples}")
    wanted = SampleRequest(
        prompt_T=wire.decode_tokens(request.prompt),
        params=_read_params(request.params),
        num_samples=request.num_samples or 1,
        prompt_logprobs=request.prompt_logprobs,
        num_top=request.topk_logprobs,
        prompt_top=request.topk_prompt_logprobs,
        targets_TK=_read_targets(request),
        last_n=request.prompt_logprobs_last_n if request.HasField("prompt_logprobs_last_n") else None,
    )
    _check_size(wanted)
    return wanted


def _read_params(params: sampling_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_k=params.top_k,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        stop_strings=tuple(params.stop_strings),
        stop_tokens=tuple(params.stop_tokens),
        ignore_eos=params.ignore_eos,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple(sorted(params.logit_bias.items())),
    )


def _read_targets(request: sampling_pb2.SampleRequest) -> npt.NDArray[np.int32] | None:
    if not request.HasField("target_prompt_tokens"):
        return None
    array = numpy_from_tensor(request.target_prompt_tokens, "target_prompt_tokens")
    if array.dtype != np.int32:
        raise make_error("BAD_SHAPE", "target_prompt_tokens: token ids are int32")
    return array[:, None] if array.ndim == 1 else array


def _check_size(wanted: SampleRequest) -> None:
    length = len(wanted.prompt_T)
    targets = 0 if wanted.targets_TK is None else wanted.targets_TK.size
    if 8 * wanted.prompt_top * length + 4 * targets > _MAX_TABLE_BYTES:
        raise make_error(
            "BAD_SAMPLING_PARAMS",
            f"log-probs of {wanted.prompt_top} tokens at {length} positions do not fit into one answer of"
            f" {_MAX_TABLE_BYTES} bytes; ask for fewer tokens or parts of the prompt",
        )


@dataclass
class _Sequence:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopTokens] = field(default_factory=list)
    stop: sampling_pb2.StopReason = sampling_pb2.STOP_REASON_UNSPECIFIED


class Answer:
    """A response that grows with a request's events."""

    def __init__(self, request: sampling_pb2.SampleRequest, wanted: SampleRequest) -> None:
        """Starts empty; a prompt that came as a list is answered with lists."""
        self._as_list = request.prompt.WhichOneof("form") == "list"
        self._response = sampling_pb2.SampleResponse(model=request.model)
        self._sequences = [_Sequence() for _ in range(wanted.num_samples)]
        self._left = wanted.num_samples
        self._table_bytes = 0

    @property
    def is_complete(self) -> bool:
        """Whether all continuations have ended."""
        return not self._left

    def add(self, event: PromptEvent | TokenEvent) -> None:
        """Takes an event in; raises BAD_SAMPLING_PARAMS when the answer would not fit into a message."""
        if isinstance(event, PromptEvent):
            _put_prompt(self._response, event)
            if event.logprobs_T.size and self._as_list:
                self._response.prompt_logprobs_list.extend(without_nan(event.logprobs_T))
                self._response.ClearField("prompt_logprobs")
            return
        sequence = self._sequences[event.index]
        sequence.tokens.append(event.token)
        sequence.logprobs.append(event.logprob)
        if event.top is not None:
            sequence.tops.append(event.top)
            self._table_bytes += 8 * event.top.ids.size
            if self._table_bytes > _MAX_TABLE_BYTES:
                raise make_error(
                    "BAD_SAMPLING_PARAMS",
                    f"topk_logprobs do not fit into one answer of {_MAX_TABLE_BYTES} bytes; use StreamSample",
                )
        sequence.stop = _STOPS[event.stop]
        self._left -= event.stop is not None

    def message(self) -> sampling_pb2.SampleResponse:
        """Returns the whole response."""
        for sequence in self._sequences:
            message = self._response.sequences.add(
                tokens=_tokens(sequence.tokens, self._as_list), stop_reason=sequence.stop
            )
            if self._as_list:
                message.logprobs_list.extend(sequence.logprobs)
            else:
                message.logprobs.CopyFrom(tensor_from_numpy(np.array(sequence.logprobs, dtype=np.float32)))
            if sequence.tops:
                ids = np.concatenate([top.ids for top in sequence.tops])
                values = np.concatenate([top.logprobs for top in sequence.tops])
                message.topk_logprobs.CopyFrom(_top(TopTokens(ids, values)))
        return self._response


class StreamedAnswer:
    """The same, token by token."""

    def __init__(self, request: sampling_pb2.SampleRequest, wanted: SampleRequest) -> None:
        """Starts with the model's name, which the first message carries."""
        self._as_list = request.prompt.WhichOneof("form") == "list"
        self._first = sampling_pb2.StreamSampleResponse(model=request.model)
        self._left = wanted.num_samples

    @property
    def is_complete(self) -> bool:
        """Whether all continuations have ended."""
        return not self._left

    def add(self, event: PromptEvent | TokenEvent) -> sampling_pb2.StreamSampleResponse | None:
        """Returns the message of an event; None for one that the next message carries."""
        if isinstance(event, PromptEvent):
            _put_prompt(self._first, event)
            return None
        message = sampling_pb2.StreamSampleResponse(
            index=event.index,
            tokens=_tokens([event.token], self._as_list),
            logprobs=tensor_from_numpy(np.array([event.logprob], dtype=np.float32)),
            stop_reason=_STOPS[event.stop],
        )
        if event.top is not None:
            message.topk_logprobs.CopyFrom(_top(event.top))
        message.MergeFrom(self._first)
        self._first.Clear()
        self._left -= event.stop is not None
        return message


def _put_prompt(message: sampling_pb2.SampleResponse | sampling_pb2.StreamSampleResponse, event: PromptEvent) -> None:
    message.prompt_cache_hit_tokens = event.num_cached
    if event.logprobs_T.size:
        message.prompt_logprobs.CopyFrom(tensor_from_numpy(event.logprobs_T))
    if event.top is not None:
        message.topk_prompt_logprobs.CopyFrom(_top(event.top))
    if event.targets_TK is not None:
        message.target_prompt_logprobs.CopyFrom(tensor_from_numpy(event.targets_TK))


def _top(top: TopTokens) -> sampling_pb2.TopLogprobs:
    return sampling_pb2.TopLogprobs(
        k=top.ids.shape[-1],
        tokens=wire.encode_tokens(top.ids.reshape(-1)),
        logprobs=tensor_from_numpy(top.logprobs),
    )


def _tokens(tokens: list[int], as_list: bool) -> types_pb2.Tokens:
    if as_list:
        return types_pb2.Tokens(list=types_pb2.TokenList(ids=tokens))
    return wire.encode_tokens(np.array(tokens, dtype=np.int32))


def without_nan(logprobs_T: npt.NDArray[np.float32]) -> list[float]:
    """Returns the numbers as a list with 0 for NaN, which not every reader of JSON takes."""
    values: list[float] = np.nan_to_num(logprobs_T).tolist()
    return values
