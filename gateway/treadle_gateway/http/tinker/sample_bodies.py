"""Sampling requests of the Tinker SDK as ours, and our answers in its protobuf.

Knows nothing of sessions and futures.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from treadle.convert import sampling_to_proto
from treadle.errors import make_error
from treadle.internal.v1 import tinker_pb2
from treadle.tensors import numpy_from_tensor, tensor_from_numpy
from treadle.types import SamplingParams
from treadle.v1 import sampling_pb2
from treadle.wire import decode_tokens, encode_tokens
from treadle_gateway.http.tinker.batches import FLOAT32
from treadle_gateway.http.tinker.bodies import Params, Prompt, Sample, TensorBody

_NO_TOKEN: Final = 0
_NO_LOGPROB: Final = np.float32(-99999.0)
_MAX_WIDTH: Final = 2**16
AnyArray = NDArray[Any]  # Element types differ by field.


def to_request(body: Sample, model: str, max_context: int) -> sampling_pb2.SampleRequest:
    """Returns our request with a seed of its own; BAD_SAMPLING_PARAMS, CONTEXT_OVERFLOW, BAD_VALUE."""
    if body.prompt_alt_tokens_k:
        raise make_error("BAD_SAMPLING_PARAMS", "prompt_alt_tokens_k is not supported here; leave it at 0")
    tokens = prompt_tokens(body.prompt)
    wanted = body.sampling_params.max_tokens
    if max_context and len(tokens) + (wanted or 1) > max_context:
        raise make_error(
            "CONTEXT_OVERFLOW",
            f"Prompt length plus max_tokens exceeds the model's context window: {len(tokens)} + {wanted or 1} > "
            f"{max_context}",
        )
    request = sampling_pb2.SampleRequest(
        model=model,
        prompt=encode_tokens(tokens),
        num_samples=body.num_samples,
        params=_params(body.sampling_params),
        prompt_logprobs=bool(body.prompt_logprobs),
        topk_logprobs=body.topk_sample_logprobs,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
    )
    if body.target_prompt_logprobs is not None:
        targets = _targets(body.target_prompt_logprobs, len(tokens))
        request.target_prompt_tokens.CopyFrom(tensor_from_numpy(targets))
    return request


def prompt_tokens(prompt: Prompt) -> NDArray[np.int32]:
    """Returns the tokens of all chunks; BAD_VALUE for anything but text."""
    for chunk in prompt.chunks:
        if chunk.type != "encoded_text":
            raise make_error("BAD_VALUE", f"prompt has a chunk of type {chunk.type[:40]!r}; bases here take text only")
    ids = np.array([token for chunk in prompt.chunks for token in chunk.tokens], np.int64)
    if not len(ids):
        raise make_error("BAD_VALUE", "prompt has no token")
    if ids.min() < 0 or ids.max() > 2**31 - 1:
        raise make_error("TOKEN_OUT_OF_RANGE", "prompt has a token id that is negative or above 2^31 - 1")
    return ids.astype(np.int32)


def to_response(answer: sampling_pb2.SampleResponse, targets: TensorBody | None) -> bytes:
    """Returns the protobuf result; `targets` is what the request asked about, for its layout."""
    response = tinker_pb2.TinkerSampleResponse(prompt_cache_hit_tokens=answer.prompt_cache_hit_tokens)
    for sequence in answer.sequences:
        made = response.sequences.add(
            stop_reason=int(sequence.stop_reason != sampling_pb2.STOP_REASON_STOP),
            tokens=decode_tokens(sequence.tokens).tobytes(),
            logprobs=numpy_from_tensor(sequence.logprobs).tobytes(),
        )
        if sequence.HasField("topk_logprobs"):
            made.topk_sampled_logprobs.CopyFrom(_top(sequence.topk_logprobs))
    if answer.HasField("prompt_logprobs"):
        response.prompt_logprobs = numpy_from_tensor(answer.prompt_logprobs).tobytes()
    if answer.HasField("topk_prompt_logprobs"):
        response.topk_prompt_logprobs.CopyFrom(_top(answer.topk_prompt_logprobs))
    if answer.HasField("target_prompt_logprobs") and targets is not None:
        # Their first row is about the second token: the first has no log-prob.
        logprobs = numpy_from_tensor(answer.target_prompt_logprobs)[1:]
        response.target_prompt_logprobs.CopyFrom(_like(targets, logprobs))
    return response.SerializeToString()


def _params(body: Params) -> sampling_pb2.SamplingParams:
    params = SamplingParams(
        max_tokens=body.max_tokens,
        seed=body.seed,
        stop=body.stop,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
    )
    return sampling_to_proto(params)


def _targets(body: TensorBody, length: int) -> NDArray[np.int32]:
    """Returns int32[length, K] with -1 where nothing is asked, from the [length - 1, K] that the SDK sends."""
    shape = body.shape or []
    if len(shape) != 2 or shape[0] != length - 1 or not 0 < shape[1] <= _MAX_WIDTH:
        raise make_error(
            "BAD_VALUE", f"target_prompt_logprobs has the shape {shape}; with {length} tokens it is [{length - 1}, K]"
        )
    values = np.array(body.data, np.int64)
    dense = np.full((length, shape[1]), -1, np.int64)
    try:
        if body.sparse_crow_indices is None:
            dense[1:] = values.reshape(shape)
        else:
            rows, cols = _cells(body)
            dense[1:][rows, cols] = values
    except (ValueError, IndexError) as error:
        raise make_error("BAD_VALUE", "target_prompt_logprobs: data and indices do not fit its shape") from error
    if dense.min() < -1 or dense.max() > 2**31 - 1:
        raise make_error("TOKEN_OUT_OF_RANGE", "target_prompt_logprobs has an id below -1 or above 2^31 - 1")
    return dense.astype(np.int32)


def _cells(body: TensorBody) -> tuple[AnyArray, AnyArray]:
    crow, col = np.array(body.sparse_crow_indices, np.int64), np.array(body.sparse_col_indices or [], np.int64)
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    if len(rows) != len(col) or (col < 0).any():
        raise ValueError("indices do not fit")
    return rows, col


def _like(body: TensorBody, logprobs: AnyArray) -> tinker_pb2.TinkerTensor:
    tensor = tinker_pb2.TinkerTensor(dtype=FLOAT32, shape=logprobs.shape)
    if body.sparse_crow_indices is None:
        tensor.dense = np.ascontiguousarray(logprobs, "<f4").tobytes()
        return tensor
    rows, cols = _cells(body)
    tensor.sparse_csr.values = logprobs[rows, cols].astype("<f4").tobytes()
    tensor.sparse_csr.crow_indices = np.array(body.sparse_crow_indices, "<i8").tobytes()
    tensor.sparse_csr.col_indices = cols.astype("<i8").tobytes()
    return tensor


def _top(top: sampling_pb2.TopLogprobs) -> tinker_pb2.TinkerTopkLogprobs:
    ids, logprobs = decode_tokens(top.tokens), numpy_from_tensor(top.logprobs).reshape(-1)
    missing = ids < 0
    return tinker_pb2.TinkerTopkLogprobs(
        token_ids=np.where(missing, np.int32(_NO_TOKEN), ids).astype("<i4").tobytes(),
        logprobs=np.where(missing, _NO_LOGPROB, logprobs).astype("<f4").tobytes(),
        k=top.k,
        length=len(ids) // top.k if top.k else 0,
    )
